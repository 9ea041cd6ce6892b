"""Trunks: the ImageNet networks whose four stages RefineNet refines, from timm."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refinenet_fast.ops import _check

REDUCTIONS = [4, 8, 16, 32]  # of the four maps, in pixels of the image per pixel of the map


STRIDES = ("3x3", "1x1")


def create_trunk(name: str, pretrained: bool = False, stride: str = "3x3") -> tuple[nn.Module, list[int]]:
    """A trunk and the channels of its maps.

    The paper's are ``"resnet50"``, ``"resnet101"`` and ``"resnet152"`` (section 3.1), with 256, 512, 1024 and 2048
    channels. State dict keys of ResNets are torchvision's.

    Args:
        name: A model of timm's, with a tag for particular weights if wanted (``"resnet50.a1_in1k"``), that has maps at
            1/4, 1/8, 1/16 and 1/32 of the image: ResNets, MobileNets, ConvNeXts and most other convolutional ones.
        pretrained: Load the weights, from the Hugging Face Hub or its cache on this machine.
        stride: Which convolution of a bottleneck has its stage's stride: ``"3x3"`` (torchvision and timm), or the first
            ``"1x1"`` (Caffe, and so the paper's trunks).

    Returns:
        The module, (N, 3, H, W) -> four maps (N, C_i, ceil(H / r_i), ceil(W / r_i)), r = 4, 8, 16, 32 (some trunks
        round down); and [C_1, ..., C_4].

    Raises:
        ImportError: timm is not installed.
        TypeError: ``name`` is not a string.
        ValueError: timm has no such model (names similar ones), or it has no four such maps; no such ``stride``, or
            the trunk has no bottlenecks to apply it to.
        RuntimeError: The pretrained weights cannot be had; says what to do.
    """
    timm = _import_timm()
    _check.choice(stride, "trunk_stride", STRIDES)
    if not isinstance(name, str):
        raise TypeError(f"trunk: expected the name of a timm model, got {name!r}")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f"; similar names: {', '.join(close)}" if close else "; timm.list_models() has them all"
        raise ValueError(f"trunk: expected the name of a timm model, got {name!r}{hint}")
    try:
        # Counted from the end, since some networks have a map at 1/2 before these and others do not.
        net = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-4, -3, -2, -1))
    except Exception as error:  # whatever timm, the Hub's client and the network raise
        if not pretrained:
            raise ValueError(_no_maps(name, str(error))) from error
        create_trunk(name, stride=stride)  # raises if the trunk itself is at fault
        raise RuntimeError(_no_weights(name, error)) from error
    reductions, order = net.feature_info.reduction(), getattr(net, "output_fmt", "NCHW")
    if reductions != REDUCTIONS or order != "NCHW":
        raise ValueError(_no_maps(name, f"{_scales(reductions)}, {getattr(order, 'value', order)}"))
    if stride == "1x1":
        _stride_first(net, name)
    return net, net.feature_info.channels()


def features(
    trunk: nn.Module,
    images: Tensor,  # (N, 3, H, W)
    again: bool = False,
) -> list[Tensor]:  # (N, C_i, H_i, W_i), four of them
    """A trunk's maps. ``again``: each stage keeps its input alone and is computed again in backward.

    A trunk that is no row of stages is one stage. Running statistics of batch norm move once a step.
    """
    if not again:
        return trunk(images)
    stages = _stages(trunk)
    if stages is None:
        return checkpoint(trunk, images, use_reentrant=False, context_fn=partial(_contexts, [trunk]))
    maps = [images]
    for stage in stages:
        contexts = partial(_contexts, stage)
        maps.append(checkpoint(_in_turn, stage, maps[-1], use_reentrant=False, context_fn=contexts))
    return maps[1:]


def _stages(trunk: nn.Module) -> list[list[nn.Module]] | None:
    """The modules of timm's ``FeatureListNet`` up to each map; None for another network."""
    ends = getattr(trunk, "return_layers", None)
    if not isinstance(trunk, nn.ModuleDict) or ends is None or len(ends) != len(REDUCTIONS):
        return None
    stages: list[list[nn.Module]] = [[]]
    for name, module in trunk.items():
        stages[-1].append(module)
        if name in ends:
            stages.append([])
    return stages[:-1]


def _in_turn(
    modules: Sequence[nn.Module],
    x: Tensor,  # (N, C, H, W)
) -> Tensor:  # (N, K, h, w)
    for module in modules:
        x = module(x)
    return x


def _contexts(modules: Sequence[nn.Module]) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What surrounds a stage in forward, and when it is computed again."""
    return nullcontext(), _statistics_stay(modules)


@contextmanager
def _statistics_stay(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block batch norm in training mode normalises as ever and leaves its running statistics alone."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    live = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, *_ in live:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, steps in live:
            norm.momentum, norm.num_batches_tracked = momentum, steps


def _stride_first(net: nn.Module, name: str) -> None:
    """Move each stage's stride from the 3x3 convolution of its first bottleneck to the 1x1 before it."""
    stages = [m for key, m in net.named_children() if key.startswith("layer")]
    moved = 0
    for block in (block for stage in stages for block in stage.children()):
        first, second = getattr(block, "conv1", None), getattr(block, "conv2", None)
        if isinstance(first, nn.Conv2d) and first.kernel_size == (1, 1) and getattr(second, "stride", None) == (2, 2):
            first.stride, second.stride = (2, 2), (1, 1)
            moved += 1
    if moved != len(REDUCTIONS) - 1:
        raise ValueError(f"trunk_stride: expected '3x3' for trunk {name!r}, which has no plain bottlenecks, got '1x1'")


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("RefineNet's trunks come from timm: run `pip install timm`.") from error
    return timm


def _scales(reductions: list[int]) -> str:
    return ", ".join(f"1/{r}" for r in reductions)


def _no_maps(name: str, found: str) -> str:
    return f"trunk: expected one with maps at {_scales(REDUCTIONS)}, NCHW, got {name!r} ({found})"


def _no_weights(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".rstrip(".")
    return (
        f"pretrained: expected to download the weights of trunk {name!r} or find them in the Hugging Face cache, got "
        f"{reason}. Without a network, either fill the cache on a machine that has one and copy it (its folder is "
        "named by HF_HOME; HF_HUB_OFFLINE=1 spares the attempts to connect), or pass pretrained=False and load a state "
        "dict into `model.trunk`."
    )
