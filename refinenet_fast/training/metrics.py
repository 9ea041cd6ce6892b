"""Scores of a segmentation, all from one confusion matrix, which ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def confusion(
    predicted: Tensor,  # (...) int64
    truth: Tensor,  # (...) int64
    num_classes: int,
    ignore_value: int,
) -> Tensor:  # (K, K) int64
    """Pixels of each true class (row) and predicted class (column); those of ``ignore_value`` are left out."""
    counted = truth != ignore_value
    pairs = truth[counted] * num_classes + predicted[counted]
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(
    matrix: Tensor,  # (K, K) int64, as confusion() gives it
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Mean IoU, pixel accuracy, mean accuracy and the IoU of each class, as fractions.

    A class that is neither in the truth nor predicted has no IoU (None), and one that is not in the truth no accuracy;
    means are over the classes that have one. All are None where nothing is labelled.
    """
    counts = matrix.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - right
    iou = [r / u if u else None for r, u in zip(right.tolist(), union.tolist())]
    accuracy = [r / t if t else None for r, t in zip(right.tolist(), true.tolist())]
    total = counts.sum().item()
    return {
        "miou": _mean(iou),
        "pixel_accuracy": right.sum().item() / total if total else None,
        "mean_accuracy": _mean(accuracy),
        "iou": dict(zip(class_names, iou, strict=True)),
        "pixels": int(total),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
