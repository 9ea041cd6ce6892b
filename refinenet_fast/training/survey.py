"""What there is to train on and with, found before training starts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from refinenet_fast.training.data import Split
from refinenet_fast.training.files import BadInput

WEIGHTINGS = ("none", "balanced", "log")
_LOG_OFFSET = 1.02  # c in ENet, section 5.2: the weights lie between 1 / log(c + 1) = 1.4 and 1 / log(c) = 50
Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]  # wraps items: what they are, they, how many


@dataclass(frozen=True)
class Survey:
    """What a scan of a split found.

    Attributes:
        pixels: (V,) int64, of each value from 0 on.
        sizes: (H, W) -> number of images.
    """

    pixels: Tensor
    sizes: Counter[tuple[int, int]]


def scan(split: Split, progress: Progress, rank: int = 0, world: int = 1) -> Survey:
    """Read this rank's share of a split, every ``world``-th image and its mask.

    Args:
        progress: Wraps the files, and may show how far it is.

    Raises:
        BadInput: A file cannot be used; names it.
    """

    def one(index: int) -> Survey:
        image, mask = split.read(index)
        return Survey(mask.flatten().bincount(), Counter([(image.shape[1], image.shape[2])]))

    mine = range(rank, len(split), world)
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))  # Pillow decodes outside the interpreter's lock
    try:
        return total(progress(f"scan {split.name}", pool.map(one, mine), len(mine)))
    finally:
        pool.shutdown(cancel_futures=True)


def total(surveys: Iterable[Survey]) -> Survey:
    """What scans of several shares have found together."""
    pixels, sizes = torch.zeros(0, dtype=torch.int64), Counter[tuple[int, int]]()
    for found in surveys:
        longest = max(len(pixels), len(found.pixels))
        pixels = _padded(pixels, longest) + _padded(found.pixels, longest)
        sizes += found.sizes
    return Survey(pixels, sizes)


def _padded(pixels: Tensor, length: int) -> Tensor:
    return torch.cat([pixels, pixels.new_zeros(length - len(pixels))])


def decide_classes(split: Split, num_classes: int | None) -> Split:
    """The split with the number of its classes, where the caller or the data set says it.

    Raises:
        BadInput: They contradict each other.
    """
    named = None if split.class_names is None else len(split.class_names)
    if num_classes is not None and named not in (None, num_classes):
        raise BadInput(f"num_classes: expected {named}, as many as the data set names, got {num_classes}")
    if num_classes is not None and num_classes < 1:
        raise BadInput(f"num_classes: expected 1 or more, got {num_classes}")
    return replace(split, num_classes=named if num_classes is None else num_classes)


def infer_classes(surveys: Iterable[Survey], ignore_value: int) -> int:
    """As many as the largest value of the masks says.

    Raises:
        BadInput: Nothing is labelled.
    """
    values = [int(v) for survey in surveys for v in survey.pixels.nonzero().flatten() if v != ignore_value]
    if not values:
        raise BadInput(f"num_classes: expected masks with classes, got only {ignore_value}, the ignore value")
    return 1 + max(values)


def class_weights(
    pixels: Tensor,  # (V,) int64
    num_classes: int,
    weighting: str,
) -> list[float]:
    """The loss's weight of each class, by its share of the labelled pixels; 0 for a class that there is none of.

    Args:
        weighting: ``"balanced"``: 1 / share, with mean 1. ``"log"``: 1 / log(1.02 + share) (ENet, Paszke et al. 2016,
            section 5.2), of which the rarest classes get 35 times as much as a class that is everywhere, and no more.
    """
    counts = _padded(pixels, max(num_classes, len(pixels)))[:num_classes].double()
    share, present = counts / counts.sum(), counts > 0
    if weighting == "log":
        return torch.where(present, 1 / torch.log(_LOG_OFFSET + share), 0).tolist()
    inverse = torch.where(present, 1 / share, 0)
    return (inverse * present.sum() / inverse.sum()).tolist()
