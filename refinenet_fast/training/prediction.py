"""Classes of images of any size, in bounded memory; and of files, whatever they are called and wherever they lie."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from refinenet_fast.model import RefineNet
from refinenet_fast.training.augment import normalise
from refinenet_fast.training.files import BadInput, images_below, read_image
from refinenet_fast.training.model_file import Description
from refinenet_fast.training.pictures import coloured, overlaid, palette, save_image, save_mask

OUTPUTS = ("classes", "colour", "overlay")


class Span(NamedTuple):
    """Of one axis: what a tile reads, and what of it is kept."""

    begin: int
    end: int
    keep_begin: int
    keep_end: int


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles of an axis: of ``tile`` pixels, at least ``overlap`` in common with the next, each pixel kept once."""
    starts = [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]
    cuts = [0, *((left + tile + right) // 2 for left, right in pairwise(starts)), length]
    return [Span(s, min(s + tile, length), a, b) for s, a, b in zip(starts, cuts, cuts[1:])]


@dataclass
class Segmenter:
    """Image -> classes at the image's own size.

    Attributes:
        network: In eval mode.
        description: Of it.
        scales: The sizes at which each tile is seen; probabilities are averaged.
        flip: Also mirrored.
        tile: Side of the square tiles that larger images are cut into; 0: never.
        overlap: Pixels that neighbouring tiles have in common; the outer half of them is not kept.
    """

    network: RefineNet
    description: Description
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    tile: int = 1024
    overlap: int = 256

    def __post_init__(self) -> None:
        if self.tile < 0 or (self.tile and not 0 <= self.overlap < self.tile):
            raise BadInput(f"overlap: expected 0 or more and less than the tile's {self.tile}, got {self.overlap}")
        if not self.scales or min(self.scales) <= 0:
            raise BadInput(f"scales: expected positive numbers, got {tuple(self.scales)}")

    @torch.inference_mode()
    def __call__(
        self,
        image: Tensor,  # (3, H, W) uint8
    ) -> Tensor:  # (H, W) int64 on the CPU, uint8 where 256 classes or fewer
        height, width = image.shape[1:]
        few = self.description.num_classes <= 256
        classes = torch.empty(height, width, dtype=torch.uint8 if few else torch.int64)
        tile = self.tile or max(height, width)
        for top in spans(height, tile, self.overlap if self.tile else 0):
            for left in spans(width, tile, self.overlap if self.tile else 0):
                found = self._tile(image[:, top.begin : top.end, left.begin : left.end])
                rows = slice(top.keep_begin - top.begin, top.keep_end - top.begin)
                columns = slice(left.keep_begin - left.begin, left.keep_end - left.begin)
                classes[top.keep_begin : top.keep_end, left.keep_begin : left.keep_end] = found[rows, columns]
        return classes

    def _tile(
        self,
        image: Tensor,  # (3, h, w) uint8
    ) -> Tensor:  # (h, w) int64
        if tuple(self.scales) == (1.0,) and self.description.scale == 1 and not self.flip:
            return self.network.predict(self._input(image, 1.0)).classes[0]
        total: Tensor | None = None
        for scale in self.scales:
            images = self._input(image, scale * self.description.scale)
            views = [images, images.flip(3)] if self.flip else [images]
            for k, view in enumerate(views):
                logits = self.network(view)
                logits = logits.flip(3) if k else logits
                size = list(image.shape[1:])
                full = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
                probabilities = full.softmax(1)
                total = probabilities if total is None else total.add_(probabilities)
        return total.argmax(1)[0]

    def _input(
        self,
        image: Tensor,  # (3, h, w) uint8
        scale: float,
    ) -> Tensor:  # (1, 3, scale * h, scale * w), of the network's dtype and on its device
        if scale != 1:
            image = v2.functional.resize(image, [max(1, round(side * scale)) for side in image.shape[1:]])
        weight = self.network.classifier.weight
        image = normalise(image.to(weight.device), self.description.mean, self.description.std)
        return image.to(weight.dtype)[None]


def find_inputs(inputs: Sequence[str]) -> dict[Path, Path]:
    """Image file -> the name its results get, without suffix; of files, folders and patterns such as ``"*.jpg"``.

    Raises:
        BadInput: One matches nothing, or two files would get the same name.
    """
    named: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for file, name in _inputs(inputs):
        other = taken.setdefault(name, file)
        if other != file:
            raise BadInput(f"{file}: expected a name of its own, got the same as {other}: predict them apart")
        named[file] = name
    return named


def _inputs(inputs: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = images_below(path)
            if not found:
                raise BadInput(f"{path}: expected images, got a folder without any")
            yield from ((file, file.relative_to(path).with_suffix("")) for file in found)
            continue
        files = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(given, recursive=True))]
        if not files:
            raise BadInput(f"{given}: expected a file, a folder or a pattern, and nothing matches it")
        yield from ((file, Path(file.stem)) for file in files)


def predict_files(
    segment: Segmenter,
    files: Mapping[Path, Path],
    out: Path,
    outputs: Sequence[str] = OUTPUTS,
    overwrite: bool = False,
) -> Iterator[tuple[Path, BadInput | None]]:
    """Write ``<output>/<name>.png`` of every file: class indices, colours, the colours over the image.

    Args:
        files: As :func:`find_inputs` gives them.

    Yields:
        Each file when it is done, and why it was skipped, or None.

    Raises:
        BadInput: A result is there already, or cannot be written; nothing is overwritten.
    """
    if unknown := set(outputs) - set(OUTPUTS):
        raise BadInput(f"outputs: expected some of {', '.join(OUTPUTS)}, got {', '.join(sorted(unknown))}")
    for path in (_output(out, output, name) for name in files.values() for output in outputs):
        if path.exists() and not overwrite:
            raise BadInput(f"{path}: there already; --overwrite replaces it")
    for file, name in files.items():
        try:
            image = read_image(file)
        except BadInput as error:
            yield file, error
            continue
        _write(segment(image).numpy(), image, out, name, outputs, segment.description.num_classes)
        yield file, None


def _output(out: Path, output: str, name: Path) -> Path:
    return out / output / name.parent / f"{name.name}.png"


def _write(
    classes: np.ndarray,  # (H, W)
    image: Tensor,  # (3, H, W) uint8
    out: Path,
    name: Path,
    outputs: Sequence[str],
    num_classes: int,
) -> None:
    colours = palette(num_classes)
    if "classes" in outputs:
        save_image(_output(out, "classes", name), classes.astype(np.uint8 if num_classes <= 256 else np.uint16))
    if "colour" in outputs:
        save_mask(_output(out, "colour", name), np.minimum(classes, 255).astype(np.uint8), colours)
    if "overlay" in outputs:
        pixels = overlaid(image.permute(1, 2, 0).numpy(), coloured(classes, colours))
        save_image(_output(out, "overlay", name), pixels)
