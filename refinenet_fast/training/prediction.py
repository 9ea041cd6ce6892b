"""Classes of images of any size, in bounded memory; and of files, whatever they are called and wherever they lie."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from refinenet_fast.model import RefineNet
from refinenet_fast.training import video
from refinenet_fast.training.augment import normalise
from refinenet_fast.training.files import BadInput, Unreadable, images_below, read_image, readable, whole_folder
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
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
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
        BadInput: One matches nothing, or two files would get the same name, or one's would lie among a video's frames.
    """
    named: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for file, name in _inputs(inputs):
        other = taken.setdefault(name, file)
        if other != file:
            raise BadInput(f"{file}: expected a name of its own, got the same as {other}: predict them apart")
        named[file] = name
    for file, name in named.items():
        for folder in name.parents:
            if folder in taken and _is_video(taken[folder]):
                message = f"a name outside the folder of {taken[folder]}'s frames, got one within: predict them apart"
                raise BadInput(f"{file}: expected {message}")
    return named


def _inputs(inputs: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    for given in inputs:
        path = Path(given)
        with readable(path):
            is_folder, is_there = path.is_dir(), path.exists()
        if is_folder:
            found = images_below(path)
            if not found:
                raise BadInput(f"{path}: expected images, got a folder without any")
            yield from ((file, file.relative_to(path).with_suffix("")) for file in found)
            continue
        files = [path] if is_there else [Path(match) for match in sorted(glob.glob(given, recursive=True))]
        if not files:
            raise BadInput(f"{given}: expected a file, a folder or a pattern, and nothing matches it")
        yield from ((file, Path(file.stem)) for file in files)


def check_results(files: Mapping[Path, Path], out: Path, outputs: Sequence[str], overwrite: bool) -> None:
    """Raise where :func:`predict_files` with these arguments would not be right.

    Raises:
        BadInput: One of ``outputs`` is unknown; a result is there already and ``overwrite`` is False.
    """
    if unknown := set(outputs) - set(OUTPUTS):
        raise BadInput(f"outputs: expected some of {', '.join(OUTPUTS)}, got {', '.join(sorted(unknown))}")
    for path in (_output(out, output, file, name) for file, name in files.items() for output in outputs):
        with readable(path):
            taken = path.exists()
        if taken and not overwrite:
            raise BadInput(f"{path}: there already; --overwrite replaces it")


def predict_files(
    segment: Segmenter,
    files: Mapping[Path, Path],
    out: Path,
    outputs: Sequence[str] = OUTPUTS,
    overwrite: bool = False,
) -> Iterator[tuple[Path, BadInput | None]]:
    """Write ``<output>/<name>.png`` of every file: class indices, colours, the colours over the image.

    Args:
        files: As :func:`find_inputs` gives them. Of a video, colours and overlay are ``<output>/<name>.mp4``, and the
            class indices of its frames PNGs in the folder ``classes/<name>``.

    Yields:
        Each file when it is done, and why it was skipped, or None.

    Raises:
        BadInput: As :func:`check_results` does; a result cannot be written.
    """
    check_results(files, out, outputs, overwrite)
    for file, name in files.items():
        paths = {output: _output(out, output, file, name) for output in outputs}
        problem = None
        try:
            (_predict_video if _is_video(file) else _predict_image)(segment, file, paths)
        except Unreadable as error:
            problem = error
        yield file, problem


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in video.SUFFIXES


def _output(out: Path, output: str, file: Path, name: Path) -> Path:
    ending = ".png" if not _is_video(file) else "" if output == "classes" else ".mp4"
    return out / output / name.parent / f"{name.name}{ending}"


def _predict_image(segment: Segmenter, file: Path, paths: Mapping[str, Path]) -> None:
    image = read_image(file)
    classes = segment(image).numpy()
    colours = palette(segment.description.num_classes)
    if "classes" in paths:
        _save_classes(paths["classes"], classes, segment)
    if "colour" in paths:
        save_mask(paths["colour"], np.minimum(classes, 255).astype(np.uint8), colours)
    if "overlay" in paths:
        save_image(paths["overlay"], overlaid(image.permute(1, 2, 0).numpy(), coloured(classes, colours)))


def _predict_video(segment: Segmenter, file: Path, paths: Mapping[str, Path]) -> None:
    """Frame by frame; where a frame cannot be decoded or encoded, nothing of the whole video is written."""
    colours = palette(segment.description.num_classes)
    videos: dict[str, video.Writer] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(whole_folder(paths["classes"])) if "classes" in paths else None
        for number, frame in enumerate(video.frames(file)):
            classes = segment(torch.from_numpy(frame.pixels).permute(2, 0, 1)).numpy()
            if folder is not None:
                _save_classes(folder / f"{number:06d}.png", classes, segment)
            colour = coloured(classes, colours)
            shown = {"colour": colour, "overlay": overlaid(frame.pixels, colour)}
            for output in shown.keys() & paths.keys():
                if output not in videos:
                    videos[output] = stack.enter_context(video.writing(paths[output], frame, file))
                videos[output].write(frame._replace(pixels=shown[output]))


def _save_classes(
    path: Path,
    classes: np.ndarray,  # (H, W)
    segment: Segmenter,
) -> None:
    save_image(path, classes.astype(np.uint8 if segment.description.num_classes <= 256 else np.uint16))
