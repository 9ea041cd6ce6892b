"""The whole network: a trunk and a cascade of RefineNet blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refinenet_fast.blocks import RefineNetBlock, check_flag, check_positive
from refinenet_fast.ops import fuse
from refinenet_fast.ops._autocast import autocast_dtype
from refinenet_fast.trunks import create_trunk

# Which of the trunk's maps (0 is 1/4, 3 is 1/32) each block reads, in the order in which the blocks run (figure 2c).
# Every block but the first reads the previous block's output as well.
FOUR_CASCADED = ((3,), (2,), (1,), (0,))


class RefineNet(nn.Module):
    """RefineNet for semantic segmentation, 4-cascaded (Lin et al., CVPR 2017, figure 2c; arXiv 1611.06612).

    The trunk's maps go through the blocks from the deepest on: {1/32}, {1/16, previous}, {1/8, previous},
    {1/4, previous}. Dropout acts on the two deepest maps and before the classifier, a 3x3 convolution with bias. The
    decoder has no batch norm; its weights start normally distributed with standard deviation 0.01, its biases at 0.

    The trunk's batch norm is ordinary. The paper trains with it frozen, which is for the training loop to do: put
    ``model.trunk`` back into eval after ``model.train()``.

    Args:
        num_classes: Channels of the logits.
        trunk: The name of a timm model with maps at 1/4, 1/8, 1/16 and 1/32; the paper's are ResNet-50, 101 and 152.
        pretrained: Load the trunk's ImageNet weights.
        crp_stages: Stages of chained residual pooling: 2 in the paper, 4 in the released networks.
        width: Channels of the blocks.
        deep_width: Channels of the deepest block.
        dropout: Probability of dropping an activation, in training.
        align_corners: Of the bilinear upsampling inside the blocks. The one of the logits never aligns corners.
        upsample: Return logits at the images' size; at 1/4 of it where False.

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
        ImportError: timm is not installed.
        RuntimeError: The pretrained weights cannot be had; says what to do.

    Example:
        >>> model = RefineNet(num_classes=21, trunk="resnet18").eval()
        >>> model(torch.randn(1, 3, 375, 500)).shape
        torch.Size([1, 21, 375, 500])
    """

    def __init__(
        self,
        num_classes: int,
        trunk: str = "resnet101",
        pretrained: bool = False,
        crp_stages: int = 2,
        width: int = 256,
        deep_width: int = 512,
        dropout: float = 0.5,
        align_corners: bool = True,
        upsample: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "crp_stages": crp_stages, "width": width, "deep_width": deep_width}
        for argument, value in sizes.items():
            check_positive(value, argument)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout!r}")
        self.upsample = check_flag(upsample, "upsample")
        self.trunk, channels = create_trunk(trunk, pretrained)
        self.blocks = nn.ModuleList()
        previous = None
        for reads in FOUR_CASCADED:
            first, last = previous is None, len(self.blocks) == len(FOUR_CASCADED) - 1
            block_width = deep_width if first else width
            units = 3 if last else 1
            maps = [channels[i] for i in reads]
            self.blocks.append(RefineNetBlock(maps, block_width, previous, crp_stages, units, align_corners))
            previous = block_width
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 3, padding=1)
        self._initialise_decoder()

    @torch.no_grad()
    def _initialise_decoder(self) -> None:
        for module in (*self.blocks.modules(), self.classifier):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N, num_classes, H, W), or (N, num_classes, H / 4, W / 4) rounded up
        """Logits, in ``channels_last`` memory.

        Args:
            images: Of any size from one pixel up, in any memory layout, normalised as the trunk's training images were
                (for timm's ResNets by ImageNet's mean and standard deviation per channel); of the model's dtype, or of
                one that autocast casts.

        Raises:
            TypeError, ValueError: ``images`` are not of this form; says what was expected and what came.
        """
        self._check_images(images)
        features = self.trunk(images.contiguous(memory_format=torch.channels_last))
        features = [*features[:2], self.dropout(features[2]), self.dropout(features[3])]
        y: Tensor | None = None
        for reads, block in zip(FOUR_CASCADED, self.blocks, strict=True):
            maps = [features[i] for i in reads]
            y = block(maps if y is None else [*maps, y])
        logits = self.classifier(self.dropout(y))
        if not self.upsample:
            return logits
        return fuse([logits], [None], size=(images.shape[2], images.shape[3]), align_corners=False)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a Tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] < 1 or images.shape[3] < 1:
            raise ValueError(f"images: expected shape (N, 3, H, W) with H, W >= 1, got {tuple(images.shape)}")
        weight = self.classifier.weight
        if images.device != weight.device:
            raise ValueError(f"images: expected device {weight.device}, that of the model, got {images.device}")
        if not images.dtype.is_floating_point or autocast_dtype(images) != autocast_dtype(weight):
            raise TypeError(f"images: expected {weight.dtype}, the dtype of the model, got {images.dtype}")
