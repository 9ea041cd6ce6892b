"""Joint augmentation of an image and its mask, by torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class RandomScale(v2.Transform):
    """Scale by a factor drawn between two; masks keep their values."""

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = self.smallest + (self.largest - self.smallest) * torch.rand(()).item()
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"])


class Augment:
    """Random scale, crop, horizontal flip and colour, then normalisation.

    Args:
        crop: Height and width of what comes out; a smaller image is padded, with a label of ``ignore_value``.
        scales: The smallest and the largest factor.
        flip: Probability of mirroring.
        colour: How far brightness, contrast and saturation are changed (0: not; 0.3: by up to 30 %).
        mean, std: Of the trunk's training images, per channel.
    """

    def __init__(
        self,
        crop: Sequence[int],
        scales: Sequence[float],
        flip: float,
        colour: float,
        ignore_value: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        grey = [round(255 * value) for value in mean]  # becomes 0
        steps: list[Any] = [
            RandomScale(*scales),
            v2.RandomCrop(list(crop), pad_if_needed=True, fill={tv_tensors.Image: grey, tv_tensors.Mask: ignore_value}),
            v2.RandomHorizontalFlip(flip),
        ]
        if colour:
            steps.append(v2.ColorJitter(colour, colour, colour))
        self.transform = v2.Compose(steps)
        self.mean, self.std = list(mean), list(std)

    def __call__(
        self,
        image: Tensor,  # (3, H, W) uint8
        mask: Tensor,  # (H, W) int64
    ) -> tuple[Tensor, Tensor]:  # (3, h, w) float32, (h, w) int64
        image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return normalise(image.as_subclass(Tensor), self.mean, self.std), mask.as_subclass(Tensor)


def normalise(
    image: Tensor,  # (..., 3, H, W) uint8
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:  # (..., 3, H, W) float32
    """Values from 0 to 1, less the mean, by the standard deviation of each channel."""
    return v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), list(mean), list(std))
