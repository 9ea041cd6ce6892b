"""Scores of a network on a split of a data set, at the masks' own resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refinenet_fast.training.data import Split
from refinenet_fast.training.files import BadInput
from refinenet_fast.training.metrics import confusion
from refinenet_fast.training.prediction import Segmenter

Sample = tuple[Tensor, Tensor]  # (3, H, W) uint8, (H, W) int64


class WholeImages(Dataset):
    """Images and masks as they are; what cannot be read comes as a :class:`BadInput`, not raised."""

    def __init__(self, split: Split, indices: range) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Sample | BadInput:
        try:
            return self.split.read(self.indices[position])
        except BadInput as error:
            return error


def evaluate(
    segment: Segmenter,
    split: Split,
    ignore_value: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
    show: Callable[[int, Tensor, Tensor, Tensor], object] = lambda index, image, mask, predicted: None,
) -> Tensor:  # (K, K) int64
    """The confusion matrix of this rank's share of a split: every ``world``-th image.

    Args:
        progress: Wraps an iterable of so many items, and may show how far it is.
        show: Called with each image's index, the image, its mask and what was predicted.

    Raises:
        BadInput: A file cannot be used; names it. The data set names other classes than the network, or in another
            order.
    """
    _check_names(split, segment.description.class_names)
    num_classes = segment.description.num_classes
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    mine = range(rank, len(split), world)
    loader: Iterable[Any] = DataLoader(
        WholeImages(split, mine), batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    for index, sample in zip(mine, progress(loader, len(mine))):
        if isinstance(sample, BadInput):
            raise sample
        image, mask = sample
        predicted = segment(image).long()
        matrix += confusion(predicted, mask, num_classes, ignore_value)
        show(index, image, mask, predicted)
    return matrix


def _check_names(split: Split, expected: list[str]) -> None:
    found = split.class_names
    if found is None:
        return
    if len(found) != len(expected):
        raise BadInput(f"{split.name}: expected {len(expected)} classes, as the network has, got {len(found)}")
    if expected == [str(k) for k in range(len(expected))]:  # the network's own data set had no names
        return
    for k, (name, other) in enumerate(zip(expected, found)):
        if name != other:
            raise BadInput(f"{split.name}: expected {name!r} as class {k}, as the network has it, got {other!r}")
