"""How a decoder starts."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from refinenet_fast.blocks import ChainedResidualPooling, MultiResolutionFusion, RefineNetBlock, ResidualConvUnit
from refinenet_fast.ops import _check

INITS = ("paper", "kaiming")


@torch.no_grad()
def initialise(blocks: Iterable[nn.Module], classifier: nn.Conv2d, init: str = "paper") -> None:
    """Set the weights of a decoder's convolutions; biases become 0.

    Args:
        blocks: :class:`RefineNetBlock` modules.
        classifier: The last convolution.
        init: ``"paper"``: all normally distributed with standard deviation 0.01, as in the authors' code; narrow
            decoders start with tiny signals. ``"kaiming"``: standard deviations after He et al., ICCV 2015, so that
            signals keep their scale through adaptive convolutions, the sum of a fusion's paths and that of a pooling's
            stages; 0 for the last convolution of a residual conv unit, which starts as the identity (Goyal et al.,
            2017, section 5.1); 0.01 for the classifier.
    """
    _check.choice(init, "init", INITS)
    for module in (*(m for block in blocks for m in block.modules()), classifier):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if init == "paper":
        return
    for block in blocks:
        for module in block.modules():
            _keep_scale(module)


def _keep_scale(module: nn.Module) -> None:
    if isinstance(module, ResidualConvUnit):
        _normal(module.conv1, math.sqrt(2))  # half of what it reads is 0
        nn.init.zeros_(module.conv2.weight)
    elif isinstance(module, RefineNetBlock):
        for conv in module.adapt:
            _normal(conv, 1.0)
    elif isinstance(module, MultiResolutionFusion):
        for conv in module.convs:
            _normal(conv, 1 / math.sqrt(len(module.convs)))
    elif isinstance(module, ChainedResidualPooling):
        for conv in module.convs:  # maxima over 25 pixels are about twice as large as the pixels
            _normal(conv, 0.5 / math.sqrt(len(module.convs)))


def _normal(conv: nn.Module, gain: float) -> None:
    assert isinstance(conv, nn.Conv2d)
    nn.init.normal_(conv.weight, std=gain / math.sqrt(conv.weight[0].numel()))
