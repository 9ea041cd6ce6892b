"""State dicts of the published networks: recognised from their shapes, loaded exactly or refused by name.

The names are those of DrSleep/refinenet-pytorch and DrSleep/light-weight-refinenet, in which stage n = 1 (1/32) ... 4
(1/4); the trunk's are torchvision's without ``fc``. There, the three residual conv units at the end of a stage are this
package's output unit and the two adaptive units of the next block's path from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
        TypeError: ``source`` is something else, or has an entry that is no tensor.
    """
    content: Any = source
    if isinstance(source, str | Path):
        content = _read_file(Path(source))
    if not isinstance(content, Mapping):
        raise TypeError(f"source: expected a state dict or the path of one, got {type(content).__name__}")
    while wrapper := next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None):
        content = content[wrapper]
    entries = {str(key).removeprefix("module."): value for key, value in content.items()}
    for key, value in entries.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"source: expected tensors, got {type(value).__name__} for key {key!r}")
    return entries


def _read_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def recognise(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``RefineNet`` for the network that has these weights.

    What is missing or damaged is taken from the entries that are not, so that :func:`load` can name it.

    Raises:
        ValueError: It is no published state dict; says what it looks like.
    """
    pools = [f"mflow_conv_g{n}_pool.0.{k}_outvar_dimred.weight" for n in STAGES for k in range(1, 9)]
    adaptive = [f"p_ims1d2_outl{n}_dimred.weight" for n in STAGES]
    units = [key for key in weights if re.fullmatch(r"(adapt_stage|mflow_conv_g)\d_b\.0\.\d_conv.*", key)]
    if not any(key in weights for key in (*pools, *adaptive)):
        raise ValueError(f"source: expected a state dict of RefineNet, {EXPECTED}, got {_looks_like(weights)}")
    firsts = [key for key in units if key.endswith("_conv.bias")]
    seconds = [key for key in units if key.endswith("varout_dimred.bias")]
    stages = Counter(key.split("_pool")[0] for key in pools if key in weights).values()
    return {
        "num_classes": _usual(weights, ["clf_conv.bias", "clf_conv.weight"], lambda w: w.shape[0], 21),
        "trunk": _trunk(weights),
        "cascades": 4,
        "scales": (1.0,),
        "crp_stages": Counter(stages).most_common(1)[0][0] if stages else 4,
        "width": _usual(weights, [*pools[8:], *adaptive[1:]], lambda w: w.shape[0], 256),
        "deep_width": _usual(weights, [*pools[:8], *adaptive[:1]], lambda w: w.shape[0], 512),
        "light_weight": not units,
        "conv_bias": "none" if units and not firsts else "both" if seconds else "first",
        "crp_kernel": _usual(weights, pools, lambda w: w.shape[-1], 3),
        "head": "1x1" if _usual(weights, ["clf_conv.weight"], lambda w: w.shape[-1], 3) == 1 else "3x3",
    }


def _usual(weights: Mapping[str, Tensor], keys: Iterable[str], of: Callable[[Tensor], int], otherwise: int) -> int:
    """What most of these entries have."""
    found = Counter(of(weights[key]) for key in keys if key in weights and weights[key].dim() > 0)
    return found.most_common(1)[0][0] if found else otherwise


def _trunk(weights: Mapping[str, Tensor]) -> str:
    blocks = [
        1 + max((int(m[1]) for key in weights if (m := re.match(rf"layer{n}\.(\d+)\.", key))), default=-1)
        for n in STAGES
    ]
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", key) for key in weights)
    trunk = TRUNKS.get((blocks[0], blocks[1], blocks[2], blocks[3], bottleneck))
    if trunk is None:
        known = ", ".join(TRUNKS.values())
        raise ValueError(f"source: expected the trunk of one of {known}, got one with {blocks} blocks in its stages")
    return trunk


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
    if len(model.scales) > 1:
        return f"scales {model.scales}"
    keys = model.trunk.state_dict().keys()
    if "conv1.bias" in keys:
        return "a trunk with its batch norm folded"
    if "layer4.0.conv1.weight" not in keys:
        return "another trunk"
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
    if any(w.dtype == torch.float64 for w in weights.values()):
        model.double()
    model.load_state_dict({ours: weights[theirs] for theirs, ours in pairs.items()})
