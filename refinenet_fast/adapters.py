"""RefineNet's blocks in other people's decoders: where their parts are, and how the ops compute what they compute.

A family is an entry or two of :data:`ADAPTERS`, found by the name of a block's class or, where that is another, by the
names of its parts. An entry knows names only: whether a block computes what the ops do is for a trial to find out
(:mod:`refinenet_fast.accelerate`).
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refinenet_fast.alterations import MARK, SETTINGS, Settings, attributes, change, is_patched, is_transformed
from refinenet_fast.blocks import Convolution, is_bare
from refinenet_fast.ops import _autocast, _check, crp, fuse, rcu_run
from refinenet_fast.ops._autocast import autocast_dtype

# As they are when this is imported: whoever patches them later is to be seen.
_CONV2D = nn.Conv2d.forward, nn.Conv2d._conv_forward
_BATCH_NORMS = _BatchNorm.forward, nn.SyncBatchNorm.forward
Forward = Callable[[], Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Parameters = tuple[Tensor, Tensor | None]  # (K, C, R, R); (K,)


class Adapter(ABC):
    """How the ops compute what the blocks of one class compute."""

    op: ClassVar[str]  # what runs in the block's place

    @abstractmethod
    def parts(self, block: Any) -> Iterator[nn.Module]:
        """The convolutions whose parameters the ops use, and the batch norms.

        Raises:
            AttributeError: The block has no such parts; says which.
        """

    @abstractmethod
    def names(self) -> tuple[list[str], list[str | None]]:
        """Of its parts: those that every block has, and patterns of the others."""

    def resembles(self, block: nn.Module, holders: set[str]) -> bool:
        """Whether it has an adapter's parts and no others; ``holders`` names its modules that have parameters."""
        needed, others = self.names()
        patterns = [f"{name}.*" for name in (*needed, *others) if name]
        known = all(any(fnmatchcase(f"{holder}.", pattern) for pattern in patterns) for holder in holders)
        return known and all(any(f"{holder}.".startswith(f"{name}.") for holder in holders) for name in needed)

    def takes(self, block: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments is one that the ops cover: by default, one with a single map."""
        return len(args) == 1 and not kwargs and _are_maps(*args)

    @abstractmethod
    def fused(self, block: Any, *args: Any, **kwargs: Any) -> Tensor | None:  # (N, C, H, W)
        """The block's result by the ops; None where they do not cover maps of these shapes."""

    @abstractmethod
    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        """Arguments to try the block with; ``data(4, c, h, w)`` makes a map, each image of another spread."""

    def forward(self, block: nn.Module, original: Forward, *args: Any, **kwargs: Any) -> Tensor:  # (N, C, H, W)
        """By the ops, or by ``original``, the block's own forward on these arguments, where they cannot."""
        covered = self.takes(block, *args, **kwargs) and not is_transformed() and self.hindrance(block) is None
        covered = covered and self._goes_with(block, *args)
        y = self.fused(block, *args, **kwargs) if covered else None
        return original() if y is None else y

    def hindrance(self, block: nn.Module) -> str | None:
        """Why the block's own forward has to run, as the block is now; None where nothing stands in the way."""
        try:
            parts = list(self.parts(block))
        except AttributeError as error:
            return f"parts that its class should have: {error}"
        for part in parts:
            if _is_norm(part):
                if part.training or part.running_mean is None:
                    return "batch norm in training, or without statistics"
            elif not is_plain(part):
                if (nn.Conv2d.forward, nn.Conv2d._conv_forward) != _CONV2D:
                    return "the forward of nn.Conv2d has been replaced, for all convolutions"
                return f"expected plain 3x3 or 1x1 convolutions that keep the size, got {part}"
        for name, child in block.named_modules():
            if is_patched(type(child)):
                return f"the forward of the class {type(child).__name__} has been replaced since"
            if child is not block and not is_bare(child):
                return f"{name!r} has hooks, another forward or is compiled by itself; its own forward would not run"
        return change(block)

    def _goes_with(self, block: nn.Module, *maps: Tensor | None) -> bool:  # each (N, C, H, W)
        """Whether autocast leaves parameters that an op takes beside these maps: of the maps' dtype, or float32.

        Autocast casts parameters of another 16-bit type for PyTorch's convolutions, not for the ops.
        """
        x = next((x for x in maps if x is not None), None)
        if x is None or not _autocast.is_on(x.device.type):
            return x is not None  # then they have the maps' dtype, or the block's own forward would raise as well
        taken = (autocast_dtype(x), torch.float32)
        return all(
            p is None or p.dtype in taken
            for part in self.parts(block)
            for p in (part.parameters() if part._modules else part._parameters.values())  # _modules: parametrized
        )

    def note(self, block: nn.Module) -> str | None:
        """What an accelerated block does no longer, beside what it computes."""
        units = [getattr(type(module), MARK, None) for module in block.modules()]
        if not any(isinstance(unit, Unit) and unit.skip == "relu" for unit in units):
            return None
        return "its ReLU worked in place and overwrote a map it was given, which now stays as it is"

    def settings(self, block: nn.Module) -> Settings:
        """What decides, beside its parts, what a block computes: activations, flags, factors."""
        parts = set(self.parts(block))
        others = [entry for entry in block.named_modules(remove_duplicate=False) if entry[1] not in parts]
        ours = [module is block or hasattr(type(module), MARK) for _, module in others]  # classes that we change
        return tuple(
            (name, None if known else type(module), frozenset({*vars(module), SETTINGS}), tuple(attributes(module)))
            for (name, module), known in zip(others, ours, strict=True)
        )


def _part(block: Any, name: str) -> Any:
    """The module of this name, which has dots where it is a child's."""
    for step in name.split("."):
        block = getattr(block, step)
    return block


def _part_or_none(block: Any, name: str | None) -> Any:
    for step in name.split(".") if name else ():
        block = getattr(block, step, None)
    return block if name else None


def is_plain(conv: nn.Module) -> bool:
    """Whether it is a convolution that the ops can run, and nothing else is done with its weight."""
    if not isinstance(conv, nn.Conv2d) or not Convolution.covers(conv) or "_conv_forward" in conv.__dict__:
        return False
    kind: Any = type(conv)
    forward = nn.Conv2d.forward if isinstance(getattr(kind, MARK, None), Plain) else kind.forward
    return forward is _CONV2D[0] and kind._conv_forward is _CONV2D[1]


def _keeps_channels(conv: nn.Module) -> bool:
    square = isinstance(conv, nn.Conv2d) and conv.in_channels == conv.out_channels
    return square and conv.kernel_size == (3, 3)


def _is_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a batch norm and nothing more, as some with an activation inside are."""
    return isinstance(module, _BatchNorm) and type(module).forward in _BATCH_NORMS


def _are_maps(*maps: Any) -> bool:
    """Whether these are dense batches of floating maps, which the ops take, or None."""
    return all(x is None or _is_map(x) for x in maps)


def _is_map(x: Any) -> bool:
    dense = isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested
    return dense and x.dim() == 4 and x.dtype in _check.DTYPES


def _is_size(value: Any) -> bool:
    """Whether the ops can upsample to it; ``F.interpolate`` takes more, a single integer for instance."""
    try:
        _check.size(value, "size")
    except (TypeError, ValueError):
        return False
    return True


def _summed_dtype(*maps: Tensor | None) -> torch.dtype:
    """That of the sum of such maps and a convolution's result: autocast casts what is convolved, not what is added."""
    given = [x for x in maps if x is not None]
    return functools.reduce(torch.promote_types, [x.dtype for x in given], autocast_dtype(given[0]))


def _folded(conv: Any, norm: Any) -> Parameters:
    """Weight and bias of a convolution and the batch norm after it, in float32 at least; differentiable."""
    if norm is None:
        return conv.weight, conv.bias
    wide = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    bias = -norm.running_mean.to(wide) if conv.bias is None else conv.bias - norm.running_mean.to(wide)
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    return conv.weight * scale[:, None, None, None], bias


@dataclass(frozen=True)
class Unit(Adapter):
    """A residual conv unit.

    Args:
        conv1, conv2: Names of the convolutions, with dots where they are a child's.
        norm1, norm2: Names of the batch norms after them, which a block may lack.
        skip: As in :func:`refinenet_fast.ops.rcu`.
    """

    conv1: str
    conv2: str
    norm1: str | None = None
    norm2: str | None = None
    skip: str = "raw"
    op = "rcu"

    def names(self) -> tuple[list[str], list[str | None]]:
        return [self.conv1, self.conv2], [self.norm1, self.norm2]

    def resembles(self, block: nn.Module, holders: set[str]) -> bool:
        """Of 3x3 convolutions that keep the channels: there is more than units that has two convolutions."""
        return super().resembles(block, holders) and all(map(_keeps_channels, self._convs(block)))

    def _norms(self, unit: Any) -> tuple[nn.Module | None, nn.Module | None]:
        return _part_or_none(unit, self.norm1), _part_or_none(unit, self.norm2)

    def _convs(self, unit: Any) -> tuple[Any, Any]:
        return _part(unit, self.conv1), _part(unit, self.conv2)

    def parts(self, block: Any) -> Iterator[nn.Module]:
        yield from self._convs(block)
        yield from (norm for norm in self._norms(block) if norm is not None)

    def parameters(self, unit: Any) -> tuple[Tensor | None, ...]:
        """``(w1, b1, w2, b2)`` as :func:`refinenet_fast.ops.rcu_run` takes them."""
        (w1, b1), (w2, b2) = map(_folded, self._convs(unit), self._norms(unit))
        return w1, b1, w2, b2

    def fused(self, block: Any, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return rcu_run(x, [self.parameters(block)], self.skip).to(_summed_dtype(x))

    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        return [((data(4, self._convs(block)[0].in_channels, 5, 6),), {})]


@dataclass(frozen=True)
class Units(Adapter):
    """Residual conv units in a row; names of their convolutions, with {} for the unit's number, from 1."""

    conv1: str
    conv2: str
    op = "rcu"

    def names(self) -> tuple[list[str], list[str | None]]:
        convs = self.conv1, self.conv2
        return [name.format(1) for name in convs], [name.format("*") for name in convs]

    def _convs(self, block: Any) -> list[tuple[Any, Any]]:
        if block.n_stages != 2:
            raise AttributeError(f"expected 2 convolutions a unit (n_stages), got {block.n_stages}")
        names = [(self.conv1.format(i), self.conv2.format(i)) for i in range(1, block.n_blocks + 1)]
        return [(getattr(block, conv1), getattr(block, conv2)) for conv1, conv2 in names]

    def parts(self, block: Any) -> Iterator[nn.Module]:
        for unit in self._convs(block):
            yield from unit

    def fused(self, block: Any, x: Tensor) -> Tensor:  # (N, C, H, W), both
        units = [(a.weight, a.bias, b.weight, b.bias) for a, b in self._convs(block)]
        return rcu_run(x, units).to(_summed_dtype(x))

    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        return [((data(4, self._convs(block)[0][0].in_channels, 5, 6),), {})]


@dataclass(frozen=True)
class Pooling(Adapter):
    """Chained residual pooling.

    Args:
        conv: The convolutions' names, with {} for the stage's number, from 1; dots as for a unit.
        order, relu: As in :func:`refinenet_fast.ops.crp`.
    """

    conv: str
    order: str = "pool-conv"
    relu: bool = False
    op = "crp"

    def names(self) -> tuple[list[str], list[str | None]]:
        return [self.conv.format(1)], [self.conv.format("*")]

    def _convs(self, block: Any) -> list[Any]:
        """As many as the block says; of one that does not say, all that there are."""
        stages = getattr(block, "n_stages", None)
        if stages is None:
            stages = 1
            while _part_or_none(block, self.conv.format(stages + 1)) is not None:
                stages += 1
        return [_part(block, self.conv.format(i)) for i in range(1, stages + 1)]

    def parts(self, block: Any) -> Iterator[nn.Module]:
        yield from self._convs(block)

    def fused(self, block: Any, x: Tensor) -> Tensor:  # (N, C, H, W), both
        convs = self._convs(block)
        y = crp(x, [c.weight for c in convs], [c.bias for c in convs], self.order, self.relu)
        return y.to(_summed_dtype(x))

    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        return [((data(4, self._convs(block)[0].in_channels, 9, 8),), {})]


@dataclass(frozen=True)
class Fusion(Adapter):
    """DPT's fusion block: ``t = below + unit1(skip)``, ``y = projection(upsample(unit2(t)))``.

    The projection, a 1x1 convolution, commutes with bilinear upsampling, whose weights sum to 1 at every pixel: it is
    done first, on a quarter of the pixels. Without a size the upsampling doubles.

    Args:
        unit1, unit2: Names of the units on the skip and on the sum; a block without skips may lack the first.
        projection: Name of the 1x1 convolution, which a block may lack.
        skip_first: Whether the block is called with the skip, then the map from below; otherwise the other way round.
        resizes: Whether a skip of another size than the map from below is resized to it (``align_corners=False``).
        upsampling: Name of a transposed convolution in the place of bilinear upsampling; a block may lack both.
    """

    unit1: str
    unit2: str
    projection: str
    skip_first: bool = False
    resizes: bool = False
    upsampling: str | None = None
    op = "rcu, fuse"

    def names(self) -> tuple[list[str], list[str | None]]:
        return [self.unit2], [self.unit1, self.projection, self.upsampling]

    def _units(self, block: Any) -> list[tuple[Any, Unit]]:
        """The units that there are, with their adapters."""
        first = getattr(block, self.unit1, None)
        units = [getattr(block, self.unit2)]
        if first is not None and not isinstance(first, nn.Identity):
            units.insert(0, first)
        adapters = [getattr(type(unit), MARK, None) for unit in units]  # not the unit's: wrappers pass attributes on
        if not all(isinstance(adapter, Unit) for adapter in adapters):
            raise AttributeError("its residual conv units are left alone")
        return list(zip(units, adapters, strict=True))

    def parts(self, block: Any) -> Iterator[nn.Module]:
        for unit, adapter in self._units(block):
            yield from adapter.parts(unit)
        projection = getattr(block, self.projection, None)
        if getattr(projection, "kernel_size", None) == (3, 3):  # which the ops can run, but not before the upsampling
            raise AttributeError(f"expected a 1x1 convolution as {self.projection!r}, got {projection}")
        if projection is not None:
            yield projection

    def takes(self, block: Any, *args: Any, **kwargs: Any) -> bool:
        """One map or two, and a size, given or the block's own."""
        sizes = [size for size in (kwargs.pop("size", None), getattr(block, "size", None)) if size is not None]
        maps = len(args) in (1, 2) and args[0] is not None and _are_maps(*args)
        return maps and not kwargs and all(map(_is_size, sizes))

    def fused(
        self,
        block: Any,
        first: Tensor,  # (N, C, H, W)
        second: Tensor | None = None,  # (N, C, H, W)
        size: tuple[int, int] | None = None,
    ) -> Tensor | None:  # (N, K, H', W')
        below, skip = (second, first) if self.skip_first else (first, second)
        if below is not None and skip is not None and autocast_dtype(below) != autocast_dtype(skip):
            return None
        if below is not None and skip is not None and below.shape != skip.shape:
            if not self.resizes or skip.shape[:2] != below.shape[:2]:
                return None
            skip = fuse([skip], [None], size=(below.shape[2], below.shape[3]), align_corners=False)
        t = self._sum(block, below, skip)
        return None if t is None else self._end(block, t.to(_summed_dtype(below, skip)), size)

    def _sum(
        self,
        block: Any,
        below: Tensor | None,  # (N, C, H, W)
        skip: Tensor | None,  # (N, C, H, W)
    ) -> Tensor | None:  # (N, C, H, W)
        """``unit2(below + unit1(skip))``, of which one may be missing."""
        units = self._units(block)
        parameters = [adapter.parameters(unit) for unit, adapter in units]
        kind = units[-1][1].skip
        if skip is None:
            return rcu_run(below, parameters[-1:], kind)
        return rcu_run(skip, parameters, kind, adds=[below, None]) if len(units) == 2 else None

    def _end(
        self,
        block: Any,
        t: Tensor,  # (N, C, H, W)
        size: tuple[int, int] | None,
    ) -> Tensor:  # (N, K, H', W')
        projection = getattr(block, self.projection, None)
        if self.upsampling is not None:
            upsampling = getattr(block, self.upsampling, None)
            return projection(t if upsampling is None else upsampling(t))
        size = size or getattr(block, "size", None) or (2 * t.shape[2], 2 * t.shape[3])
        corners = getattr(block, "align_corners", True)
        if projection is not None:
            return fuse([t], [projection.weight], [projection.bias], size=size, align_corners=corners)
        if _autocast.is_on(t.device.type):  # whose rules for upsampling are its own, and the device's
            return F.interpolate(t, tuple(size), mode="bilinear", align_corners=corners)
        return fuse([t], [None], size=size, align_corners=corners)

    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        unit, adapter = self._units(block)[-1]
        channels = next(adapter.parts(unit)).in_channels
        x, skip, odd = (data(4, channels, *size) for size in ((5, 6), (5, 6), (4, 7)))
        calls: list[Arguments] = [((x,), {})]
        if len(self._units(block)) == 2:
            calls.append(((x, skip), {}))
            if self.resizes:
                calls.append(((x, odd), {}))
        if "size" in inspect.signature(type(block).forward).parameters:
            calls.append(((x,), {"size": (9, 11)}))
        return calls


@dataclass(frozen=True)
class Plain(Adapter):
    """Any other 3x3 convolution of stride 1, once a block has been found."""

    op = "conv3x3"

    def names(self) -> tuple[list[str], list[str | None]]:
        return [], []

    def parts(self, block: Any) -> Iterator[nn.Module]:
        yield block

    def fused(self, block: Any, x: Tensor) -> Tensor:  # (N, C, H, W); (N, K, H, W)
        return fuse([x], [block.weight], [block.bias])

    def trials(self, block: Any, data: Callable[..., Tensor]) -> list[Arguments]:
        return [((data(4, block.in_channels, 5, 6),), {})]


# Pattern of the class's name, adapter; the first that stands its trial is taken.
ADAPTERS: tuple[tuple[str, Adapter], ...] = (
    # Hugging Face transformers: dpt, depth_anything, zoedepth, depth_pro and what copies them.
    ("*PreActResidualLayer", Unit("convolution1", "convolution2", "batch_norm1", "batch_norm2")),
    ("DepthProFeatureFusionLayer", Fusion("residual_layer1", "residual_layer2", "projection", upsampling="deconv")),
    ("*FeatureFusionLayer", Fusion("residual_layer1", "residual_layer2", "projection", resizes=True)),
    # Depth Pro's own code; before the names below, which match too.
    ("ResidualBlock", Unit("residual.1", "residual.3")),
    ("ResidualBlock", Unit("residual.1", "residual.4", "residual.2", "residual.5")),
    ("FeatureFusionBlock2d", Fusion("resnet1", "resnet2", "out_conv", upsampling="deconv")),
    # MiDaS, isl-org/DPT, Depth Anything, CroCo and DUSt3R, VGGT. An in-place ReLU makes the skip relu(x).
    ("ResidualConvUnit*", Unit("conv1", "conv2", "bn1", "bn2")),
    ("ResidualConvUnit*", Unit("conv1", "conv2", "bn1", "bn2", skip="relu")),
    ("FeatureFusionBlock*", Fusion("resConfUnit1", "resConfUnit2", "out_conv")),
    # segmentation_models_pytorch.
    ("ResidualConvBlock", Unit("conv_1", "conv_2", "batch_norm_1", "batch_norm_2")),
    ("FusionBlock", Fusion("residual_conv_block1", "residual_conv_block2", "project", skip_first=True)),
    # RefineNet: refinenet-pytorch, light-weight-refinenet; pytorch_refinenet, whose units are named as MiDaS'.
    ("RCUBlock", Units("{}_conv", "{}_conv_relu_varout_dimred")),
    ("CRPBlock", Pooling("{}_outvar_dimred")),
    ("ChainedResidualPool*", Pooling("block{}.1", relu=True)),
    ("ChainedResidualPool*", Pooling("block{}.0", "conv-pool", relu=True)),
)
