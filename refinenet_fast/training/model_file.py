"""A trained network in one file: weights as safetensors, and in its header all that is needed to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinenet_fast.model import RefineNet
from refinenet_fast.training.files import BadInput, first_line, readable, write_whole

KEY = "refinenet_fast"  # of the description in the header
BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class Description:
    """What is written beside the weights.

    Attributes:
        network: Arguments of ``RefineNet``.
        class_names: One a class.
        mean, std: What images are normalised with.
        scale: What images are scaled by before the network sees them.
        ignore_value: Of the pixels that were not labelled in the masks it was trained on.
    """

    network: dict[str, Any]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    scale: float = 1.0
    ignore_value: int = 255

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def save_model(path: Path, model: nn.Module, description: Description) -> None:
    """Write a model file, whole or not at all.

    Raises:
        BadInput: It cannot be written; says why.
    """
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    content = save(state, {KEY: json.dumps(asdict(description))})
    write_whole(path, lambda file: file.write(content))


def load_model(path: Path, num_classes: int | None = None) -> tuple[RefineNet, Description]:
    """The network of a model file or of a run's folder (its best one, else its last), in eval mode.

    Args:
        num_classes: What the caller expects, or None.

    Raises:
        BadInput: It is no model file, or is damaged, is of an unknown network, or has another number of classes.
    """
    with readable(path):
        path = _in_folder(path)
    state, description = read_model(path)
    if num_classes not in (None, description.num_classes):
        raise BadInput(f"num_classes: expected {description.num_classes}, as {path} has, got {num_classes}")
    try:
        model = RefineNet(description.num_classes, **description.network)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise BadInput(f"{path}: expected a network that this version can build, got {first_line(error)}") from error
    if any(v.dtype == torch.float64 for v in state.values()):
        model.double()
    load_weights(model, state, path)
    return model.eval(), description


def _in_folder(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).exists():
            return path / name
    raise BadInput(f"{path}: expected a model file or a run's folder, got a folder without {BEST} or {LAST}")


def read_model(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Weights and description of a model file.

    Raises:
        BadInput: It is none, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with readable(path):
        if not path.is_file():
            raise BadInput(f"{path}: expected a model file, there is none")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        return state, Description(**json.loads(header))
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise BadInput(
            f"{path}: expected a model file that `refinenet-fast train` has written, got {reason}"
        ) from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Copy ``state`` into ``model``.

    Raises:
        BadInput: A key is missing, unknown or of another shape; names them.
    """
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if problems:
        few = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise BadInput(f"{source}: expected the weights of this network, got {len(problems)} keys that differ: {few}")
    model.load_state_dict(dict(state))
