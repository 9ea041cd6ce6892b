"""Batch norm folded into the convolutions before it, for inference."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from refinenet_fast.blocks import Convolution

Model = TypeVar("Model", bound=nn.Module)


def folded(model: Model) -> Model:
    """A copy of ``model`` in eval mode whose trunks have no batch norm: its scale and shift are in the convolutions.

    Which convolution a batch norm follows is seen by running each trunk once on a small image.

    Raises:
        ValueError: A batch norm does not follow a convolution (names it), or folding would change the maps.
    """
    with torch.inference_mode(False):
        model = copy.deepcopy(model).eval()
        trunks: Any = model.trunks
        for trunk in trunks:
            expected, before = _run(trunk)
            for name, norm in [(n, m) for n, m in trunk.named_modules() if isinstance(m, _BatchNorm)]:
                if norm not in before or norm.running_mean is None:
                    raise ValueError(f"model: expected batch norm with statistics after a convolution, {name!r} is not")
                _replace(trunk, before[norm], _fastest(fuse_conv_bn_eval(before[norm], norm)))
                _replace(trunk, norm, _activation_of(norm))
            for got, want in zip(_run(trunk)[0], expected, strict=True):
                if not torch.allclose(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max())):
                    raise ValueError("model: expected a trunk whose convolutions use their weights as they are")
    return model


def _run(trunk: nn.Module) -> tuple[list[Tensor], dict[nn.Module, nn.Conv2d]]:
    """The maps of a small image, and for each batch norm the convolution whose result it reads."""
    made_by: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # with the tensor, so that its address stays its own
    before: dict[nn.Module, nn.Conv2d] = {}

    def after_convolution(
        layer: nn.Conv2d,
        args: tuple[Tensor, ...],  # (1, C, H, W)
        y: Tensor,  # (1, K, H', W')
    ) -> None:
        made_by[id(y)] = y, layer

    def at_norm(
        norm: nn.Module,
        args: tuple[Tensor, ...],  # (1, C, H, W)
    ) -> None:
        if id(args[0]) in made_by:
            before[norm] = made_by[id(args[0])][1]

    handles = []
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(at_norm))
    like = next(trunk.parameters())
    image = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64).to(like)
    with torch.no_grad():
        maps = trunk(image)
    for handle in handles:
        handle.remove()
    return list(maps), before


def _fastest(conv: nn.Conv2d) -> nn.Conv2d:
    """Run by a backend where it is a 3x3 convolution that one has; the 1x1 ones are left to the vendor."""
    if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and Convolution.covers(conv):
        conv.__class__ = Convolution
    return conv


def _activation_of(norm: Any) -> nn.Module:
    """What is left of a batch norm: nothing, or the activation that timm's have built in."""
    return nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in root.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
