"""State dicts of the published networks: recognised from their shapes, loaded exactly or refused by name.

The names are those of DrSleep/refinenet-pytorch and DrSleep/light-weight-refinenet, in which stage n = 1 (1/32) ... 4
(1/4); the trunk's are torchvision's without ``fc``. There, the three residual conv units at the end of a stage are this
package's output unit and the two adaptive units of the next block's path from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("segmenter", "model", "weights", "state_dict")
STAGES = range(1, 5)
EXPECTED = "one of refinenet-pytorch or light-weight-refinenet (keys such as 'p_ims1d2_outl1_dimred.weight')"
# Residual blocks of each stage, and whether they are bottlenecks.
TRUNKS = {
    (2, 2, 2, 2, False): "resnet18",
    (3, 4, 6, 3, False): "resnet34",
    (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101",
    (3, 8, 36, 3, True): "resnet152",
}


def read(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in ``source``, unwrapped and without ``module.`` prefixes.

    Raises:
        TypeError: ``source`` is something else, or has an entry that is no floating tensor.
        ValueError: Two keys differ by the prefix alone.
    """
    content: Any = source
    if isinstance(source, str | Path):
        content = _read_file(Path(source))
    if not isinstance(content, Mapping):
        raise TypeError(f"source: expected a state dict or the path of one, got {type(content).__name__}")
    while wrapper := next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = content[wrapper]
    entries: dict[str, Tensor] = {}
    for given, value in content.items():
        key = str(given).removeprefix("module.")
        if not isinstance(value, Tensor):
            raise TypeError(f"source: expected tensors, got {type(value).__name__} for key {key!r}")
        if not (value.dtype.is_floating_point or _counts(key)) or value.is_meta:
            raise TypeError(f"source: expected floating tensors with data, got {value.dtype} for key {key!r}")
        if key in entries:
            raise ValueError(f"source: expected each key once, got {key!r} with the prefix 'module.' and without")
        entries[key] = value
    return entries


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def recognise(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``RefineNet`` that these weights decide.

    What is missing or damaged is taken from the entries that are not, so that :func:`load` can name it.

    Raises:
        ValueError: It is no published state dict; says what it looks like.
    """
    pools = [f"mflow_conv_g{n}_pool.0.{k}_outvar_dimred.weight" for n in STAGES for k in STAGES]
    deep, wide = pools[: len(STAGES)], pools[len(STAGES) :]
    adaptive = [f"p_ims1d2_outl{n}_dimred.weight" for n in STAGES]
    joint = [f"adapt_stage{n}_b2_joint_varout_dimred.weight" for n in STAGES[1:]]
    if not any(key in weights for key in (*pools, *adaptive)):
        raise ValueError(f"source: expected a state dict of RefineNet, {EXPECTED}, got {_looks_like(weights)}")

    def usual(keys: Iterable[str], dimension: int, otherwise: int) -> int:
        """The size of most of these entries."""
        found = Counter(weights[key].shape[dimension] for key in keys if key in weights and weights[key].dim() == 4)
        return found.most_common(1)[0][0] if found else otherwise

    bias = weights.get("clf_conv.bias")
    classes = bias.shape[0] if bias is not None and bias.dim() == 1 else 21
    return {
        "num_classes": usual(["clf_conv.weight"], 0, classes),
        "trunk": _trunk(weights),
        "width": usual([*wide, *adaptive[1:]], 0, 256),
        "deep_width": usual([*deep, *adaptive[:1]], 0, 512),
        "light_weight": usual([*adaptive, *joint], 3, 3) == 1,
        "head": "1x1" if usual(["clf_conv.weight"], 3, 3) == 1 else "3x3",
    }


def _trunk(weights: Mapping[str, Tensor]) -> str:
    """The ResNet that has the most residual blocks in common with these."""
    found = {tuple(map(int, m.groups())) for key in weights if (m := re.match(r"layer(\d)\.(\d+)\.", key))}
    if not found:
        raise ValueError(f"source: expected the trunk of one of {', '.join(TRUNKS.values())}, got no residual blocks")
    bottlenecks = sum(f"layer{n}.{i}.conv3.weight" in weights for n, i in found)

    def differing(blocks: tuple[int, int, int, int, bool]) -> int:
        return len(found ^ {(n, i) for n in STAGES for i in range(blocks[n - 1])})

    alike = [blocks for blocks in TRUNKS if blocks[4] == (2 * bottlenecks > len(found))]
    return TRUNKS[min(alike, key=differing)]


def _looks_like(weights: Mapping[str, Tensor]) -> str:
    keys = list(weights)
    if any(key.startswith("blocks.") for key in keys) and "classifier.weight" in keys:
        return "one of refinenet_fast.RefineNet itself: build the network and call load_state_dict"
    if "layer4.0.conv1.weight" in keys:
        return "that of a ResNet without a decoder" if "fc.weight" not in keys else "that of a ResNet classifier"
    return f"keys such as {', '.join(map(repr, keys[:3]))}" if keys else "an empty one"


def names(model: Any) -> dict[str, str]:
    """Published name -> this package's, for every entry of the model's state dict.

    Raises:
        ValueError: The published networks have no names for this variant; says why.
    """
    reason = _unnamed(model)
    if reason:
        raise ValueError(f"model: expected one that has a published layout: 4-cascaded, on a ResNet; got {reason}")
    pairs = {key: f"trunks.0.{key}" for key in model.trunk.state_dict()}
    for n, block in zip(STAGES, model.blocks, strict=True):
        ours, following = f"blocks.{n - 1}", f"blocks.{n}"
        pairs[f"p_ims1d2_outl{n}_dimred.weight"] = f"{ours}.adapt.0.weight"
        pairs |= _units(f"adapt_stage{n}_b.0", 1, f"{ours}.units.0", block.units[0])
        if n > 1:
            pairs[f"adapt_stage{n}_b2_joint_varout_dimred.weight"] = f"{ours}.fusion.convs.0.weight"
        for k in range(len(block.pooling.convs)):
            pairs[f"mflow_conv_g{n}_pool.0.{k + 1}_outvar_dimred.weight"] = f"{ours}.pooling.convs.{k}.weight"
        pairs |= _units(f"mflow_conv_g{n}_b.0", 1, f"{ours}.output", block.output)
        if n < len(STAGES):
            path = model.blocks[n].units[1]
            pairs |= _units(f"mflow_conv_g{n}_b.0", 1 + len(block.output), f"{following}.units.1", path)
            pairs[f"mflow_conv_g{n}_b3_joint_varout_dimred.weight"] = f"{following}.fusion.convs.1.weight"
    return {**pairs, "clf_conv.weight": "classifier.weight", "clf_conv.bias": "classifier.bias"}


def _units(theirs: str, first: int, ours: str, units: Any) -> dict[str, str]:
    """Residual conv units: theirs are counted from ``first``."""
    pairs = {}
    for r, unit in enumerate(units):
        for conv, suffix in ((unit.conv1, ""), (unit.conv2, "_relu_varout_dimred")):
            which = "conv2" if suffix else "conv1"
            for parameter, _ in conv.named_parameters():
                pairs[f"{theirs}.{first + r}_conv{suffix}.{parameter}"] = f"{ours}.{r}.{which}.{parameter}"
    return pairs


def _unnamed(model: Any) -> str | None:
    """Why the published networks have no names for ``model``, or None."""
    if len(model.blocks) != len(STAGES):
        return f"{len(model.blocks)} cascades"
    if model.scales != (1.0,):
        return f"scales {model.scales}"
    if "conv1.bias" in model.trunk.state_dict():
        return "a trunk with its batch norm folded"
    if model.trunk_name not in TRUNKS.values():
        return f"trunk {model.trunk_name!r}"
    return None


@torch.no_grad()
def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy published ``weights`` into ``model``, which becomes float64 if they are, float32 otherwise.

    Raises:
        ValueError: A key is missing, unknown or of another shape; names all of them.
    """
    pairs, own = names(model), model.state_dict()
    problems = [f"missing: {key}" for key in pairs if key not in weights]
    problems += [f"unknown: {key}" for key in weights if key not in pairs]
    for key in pairs.keys() & weights.keys():
        got, want = tuple(weights[key].shape), tuple(own[pairs[key]].shape)
        if got != want:
            problems.append(f"of another shape: {key} {got}, expected {want}")
    if problems:
        raise ValueError(
            f"source: expected {EXPECTED}, and got {len(problems)} keys that differ: {'; '.join(problems)}"
        )
    if any(w.dtype == torch.float64 for key, w in weights.items() if not _counts(key)):
        model.double()
    model.load_state_dict({ours: weights[theirs] for theirs, ours in pairs.items()})
