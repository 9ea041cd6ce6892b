"""Everything that a training run can be told: the command line's options and the run's ``settings.json``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from refinenet_fast.training.data import LAYOUTS
from refinenet_fast.training.files import BadInput
from refinenet_fast.training.survey import WEIGHTINGS
from refinenet_fast.trunks import STRIDES
from refinenet_fast.variants import PRESETS

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bfloat16", "float16", "float64")
# What may differ when a run goes on: nothing of it changes the result, but for rounding on several ranks.
FREE = {
    *("data", "device", "workers", "log_every", "save_every", "scan"),
    *("recompute", "checkpoint_blocks", "tensorboard"),
}
# What may differ between the machines of one run.
LOCAL = {"data", "device", "weights", "workers"}
_CHOICES = {
    "layout": tuple(LAYOUTS),
    "optimizer": OPTIMIZERS,
    "precision": PRECISIONS,
    "class_weights": WEIGHTINGS,
    "preset": tuple(PRESETS),
    "trunk_stride": (None, *STRIDES),
}


@dataclass(frozen=True)
class TrainSettings:
    """A training run; by default the paper's recipe (section 4) with a polynomial decay of the rate."""

    data: Annotated[Path, "Folder of the data set."]
    layout: Annotated[str, f"What is in it: {', '.join(LAYOUTS)}."] = "folder"
    train_split: Annotated[str, "Name of the training split."] = "train"
    val_split: Annotated[str, "Name of the validation split; empty: no validation."] = "val"
    num_classes: Annotated[int | None, "Classes; by default as many as the data set names or its masks hold."] = None
    ignore_value: Annotated[int, "Value of a mask's pixels that are not labelled."] = 255
    scan: Annotated[bool, "Read every file before training, to find a bad one then and not hours later."] = True

    preset: Annotated[str, f"Network: {', '.join(PRESETS)}."] = "pytorch-port"
    trunk: Annotated[str | None, "timm's name of the trunk; by default the preset's."] = None
    trunk_stride: Annotated[
        str | None, f"Which convolution of a bottleneck has the stride: {', '.join(STRIDES)}; by default the preset's."
    ] = None
    pretrained: Annotated[bool, "Start from the trunk's ImageNet weights."] = True
    width: Annotated[int, "Channels of the decoder's blocks."] = 256
    deep_width: Annotated[int | None, "Channels of its deepest block; by default twice the width."] = None
    dropout: Annotated[float, "Probability of dropping an activation."] = 0.5
    freeze_bn: Annotated[bool | None, "Keep the trunk's batch norm as it is; by default where it is pretrained."] = None
    init: Annotated[str, "How the decoder starts: kaiming, or paper."] = "kaiming"
    weights: Annotated[Path | None, "Start from the weights of this model file instead."] = None

    crop: Annotated[tuple[int, int], "Height and width of what is trained on."] = (512, 512)
    scales: Annotated[tuple[float, float], "Images are scaled by a factor between these two."] = (0.7, 1.3)
    flip: Annotated[float, "Probability of mirroring an image."] = 0.5
    colour: Annotated[float, "How far brightness, contrast and saturation are changed; 0.3 is 30 percent."] = 0.0
    val_scale: Annotated[float, "Validation images are scaled by this; the scores are at the mask's own size."] = 1.0
    val_every: Annotated[int, "Epochs between two validations, beside the one at the end."] = 1

    epochs: Annotated[int, "Times that every image is seen."] = 100
    batch: Annotated[int, "Images of a step, over all devices and accumulated parts."] = 8
    accumulate: Annotated[int, "Parts that a step's images are run in, one after the other, on each device."] = 1
    optimizer: Annotated[str, f"{', '.join(OPTIMIZERS)}."] = "sgd"
    lr: Annotated[float, "The decoder's learning rate at the start."] = 5e-3
    trunk_scale: Annotated[float, "The trunk's rate, as a fraction of the decoder's."] = 0.1
    momentum: Annotated[float, "Of SGD."] = 0.9
    weight_decay: Annotated[float, "Of every parameter."] = 5e-4
    power: Annotated[float, "The rate falls as (1 - step / steps) to this power."] = 0.9
    class_weights: Annotated[
        str, "Of the loss: none, balanced (1 / share of pixels), log (the milder 1 / log(1.02 + share) of ENet)."
    ] = "none"
    ema: Annotated[
        float, "Decay of a moving average of the weights, which is then what is scored and kept; 0: none."
    ] = 0.0

    precision: Annotated[str, f"{', '.join(PRECISIONS)}; 16 bits by autocast."] = "float32"
    recompute: Annotated[
        bool, "Compute a convolution of each residual conv unit again in backward instead of keeping its result."
    ] = True
    checkpoint_blocks: Annotated[
        bool, "Compute whole blocks of the decoder and stages of the trunk again: the least memory."
    ] = False
    compile: Annotated[bool, "Run the network through torch.compile."] = False
    device: Annotated[str, "auto, cpu, cuda or cuda:<n>."] = "auto"
    workers: Annotated[
        int | None, "Processes that load data; by default one a core, at most 8, divided by the ranks."
    ] = None
    seed: Annotated[int, "Of the weights, the order, the augmentation and dropout."] = 0
    log_every: Annotated[int, "Steps between two rows of log.csv."] = 10
    save_every: Annotated[int, "Steps between two checkpoints, beside the one after each epoch; 0: none."] = 0
    tensorboard: Annotated[bool, "Also write what log.csv holds, and the pictures, for TensorBoard."] = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                words = ", ".join(word for word in known if word is not None)
                raise BadInput(f"{name}: expected one of {words}, got {getattr(self, name)!r}")
        for name in ("width", "val_every", "epochs", "batch", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("save_every", "trunk_scale", "momentum", "weight_decay", "power", "colour", "ignore_value"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise BadInput(f"workers: expected 0 or more, got {self.workers}")
        for name in ("lr", "val_scale"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("dropout", "flip", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name}: expected a fraction from 0 to 1, got {getattr(self, name)}")
        if min(self.crop) < 1:
            raise BadInput(f"crop: expected two positive sizes, got {self.crop}")
        network = self.network()
        smallest = min(network.get("scales", (1.0,)))
        if round(max(self.crop) * smallest) <= 32 and not network["freeze_bn"]:  # one value a channel in a deepest map
            more = math.floor(32.5 / smallest)
            raise BadInput(f"crop: expected more than {more} pixels where batch norm is not frozen, got {self.crop}")
        if not 0 < self.scales[0] <= self.scales[1]:
            raise BadInput(f"scales: expected two positive factors, the smaller first, got {self.scales}")

    def network(self) -> dict[str, Any]:
        """Arguments of ``RefineNet``, but for ``num_classes`` and whether the trunk is pretrained."""
        freeze = self.pretrained if self.freeze_bn is None else self.freeze_bn
        named = {"trunk": self.trunk, "trunk_stride": self.trunk_stride}
        return {
            **PRESETS[self.preset],
            **{name: value for name, value in named.items() if value is not None},
            "width": self.width,
            "deep_width": self.deep_width or 2 * self.width,
            "dropout": self.dropout,
            "freeze_bn": freeze,
            "init": self.init,
        }

    def to_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainSettings:
        """What :meth:`to_json` gave.

        Raises:
            BadInput: It is something else; says what.
        """
        kinds = option_types()
        if unknown := set(content) - set(kinds):
            raise BadInput(f"settings.json: expected a run's settings, got unknown ones: {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {}
        for name, value in content.items():
            kind = kinds[name][0]
            is_path = value is not None and Path in (kind, *get_args(kind))
            values[name] = Path(value) if is_path else tuple(value) if get_origin(kind) is tuple else value
        return cls(**values)


def option_types() -> dict[str, tuple[Any, str]]:
    """Name -> type and what it means, of every setting."""
    hints = get_type_hints(TrainSettings, include_extras=True)
    return {f.name: get_args(hints[f.name])[:2] for f in dataclasses.fields(TrainSettings)}
