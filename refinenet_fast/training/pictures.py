"""What people look at: colour masks, overlays, a row of input, truth and prediction, a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refinenet_fast.training.files import write_whole

UNLABELLED = (255, 255, 255)


def palette(num_classes: int) -> np.ndarray:  # (256, 3) uint8
    """Colours of classes: PASCAL VOC's, in which every index has its own; white for all that is no class."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        shift, channel = divmod(bit, 3)
        colours[:, channel] |= (((index >> bit) & 1) << (7 - shift)).astype(np.uint8)
    colours[num_classes:] = UNLABELLED
    return colours


def coloured(
    classes: np.ndarray,  # (H, W)
    colours: np.ndarray,  # (256, 3) uint8
) -> np.ndarray:  # (H, W, 3) uint8
    """Each pixel in the colour of its class."""
    return colours[np.minimum(classes, 255).astype(np.uint8)]


def overlaid(
    image: np.ndarray,  # (H, W, 3) uint8
    colour: np.ndarray,  # (H, W, 3) uint8
) -> np.ndarray:  # (H, W, 3) uint8
    """The mean of the two."""
    return (image >> 1) + (colour >> 1)


def triptych(
    image: Tensor,  # (3, H, W) uint8
    truth: Tensor,  # (H, W) int64
    predicted: Tensor,  # (H, W) int64
    num_classes: int,
) -> np.ndarray:  # (H, 3 * W, 3) uint8
    """Input, truth and prediction side by side."""
    colours = palette(num_classes)
    masks = [coloured(mask.clamp(0, 255).numpy(), colours) for mask in (truth, predicted)]
    return np.concatenate([image.permute(1, 2, 0).numpy(), *masks], axis=1)


def save_image(
    path: Path,
    pixels: np.ndarray,  # (H, W, 3) or (H, W) uint8
) -> None:
    """A PNG, written whole."""
    write_whole(path, lambda file: Image.fromarray(pixels).save(file, "PNG"))


def save_mask(
    path: Path,
    classes: np.ndarray,  # (H, W) uint8
    colours: np.ndarray,  # (256, 3) uint8
) -> None:
    """A PNG whose pixel values are classes, shown in their colours."""
    mask = Image.fromarray(classes)
    mask.putpalette(colours.tobytes())
    write_whole(path, lambda file: mask.save(file, "PNG"))


def save_confusion(
    path: Path,
    matrix: Tensor,  # (K, K) int64
    class_names: Sequence[str],
) -> None:
    """A picture of the confusion matrix, each row as shares of its true class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.45 * len(class_names)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=90)
    axes.set_yticks(ticks, class_names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(class_names) <= 25:
        for row, column in torch.cartesian_prod(torch.arange(len(ticks)), torch.arange(len(ticks))).tolist():
            share = shares[row, column].item()
            colour = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, label="share of the true class")
    write_whole(path, lambda file: figure.savefig(file, format="png"))
