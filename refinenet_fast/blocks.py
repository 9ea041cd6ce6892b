"""RefineNet's blocks as modules, named as in the paper (Lin et al., CVPR 2017, section 3.2; arXiv 1611.06612).

Their children are ``nn.Conv2d``, so initialisation, weight decay groups, parametrizations and state dicts work
as everywhere. Inside a fused op a child only holds its parameters: its own forward, and hooks on it, do not run. All
blocks take any floating dtype and return ``channels_last`` memory; under autocast the parameters stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from refinenet_fast.ops import _check, crp, fuse, rcu, rcu_run
from refinenet_fast.ops.crp import ORDERS
from refinenet_fast.ops.rcu import SKIPS


class Convolution(nn.Conv2d):
    """An ``nn.Conv2d`` that a backend runs: 3x3 or 1x1, and of the size of its input.

    Raises:
        ValueError: It is another convolution than that; says which argument.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.covers(self):
            raise ValueError(
                f"expected a 3x3 convolution with padding 1, or a 1x1 one, and no other option, got {self}"
            )

    @staticmethod
    def covers(conv: nn.Conv2d) -> bool:
        """Whether this class can take the place of a convolution."""
        side = conv.kernel_size[0]
        same = conv.padding == (side // 2, side // 2) or conv.padding == "same"
        plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
        return conv.kernel_size in ((1, 1), (3, 3)) and same and plain

    def forward(
        self,
        x: Tensor,  # (N, C, H, W)
    ) -> Tensor:  # (N, K, H, W)
        return fuse([x], [self.weight], [self.bias])


class ResidualConvUnit(nn.Module):
    """Residual conv unit (section 3.2): ``y = x + conv2(relu(conv1(relu(x))))``, both convolutions 3x3.

    Args:
        channels: C.
        bias: Whether the first and the second convolution have a bias.
        skip: ``"raw"`` adds ``x`` (paper); ``"relu"`` adds ``relu(x)`` (ports whose ReLU works in place).
        recompute: Whether backward computes the first convolution again instead of keeping its result.

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
    """

    def __init__(
        self, channels: int, bias: tuple[bool, bool] = (True, False), skip: str = "raw", recompute: bool = False
    ) -> None:
        super().__init__()
        check_positive(channels, "channels")
        first, second = _pair(bias, "bias")
        self.skip = _check.choice(skip, "skip", SKIPS)
        self.recompute = _check.flag(recompute, "recompute")
        self.conv1 = _conv(channels, channels, bias=first)
        self.conv2 = _conv(channels, channels, bias=second)

    def forward(
        self,
        x: Tensor,  # (N, C, H, W)
    ) -> Tensor:  # (N, C, H, W)
        return rcu(x, *self.parameters_in_order(), self.skip, self.recompute)

    def parameters_in_order(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """``(w1, b1, w2, b2)``: (C, C, 3, 3), (C,) or None, (C, C, 3, 3), (C,) or None."""
        return self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias

    def extra_repr(self) -> str:
        return f"skip={self.skip!r}"


class ResidualConvUnits(nn.Sequential):
    """Residual conv units in a row, run as one op; one after another where a unit has hooks or has been replaced."""

    def forward(
        self,
        x: Tensor,  # (N, C, H, W)
    ) -> Tensor:  # (N, C, H, W)
        units = [unit for unit in self if _is_bare(unit)]
        options = {(unit.skip, unit.recompute) for unit in units}
        if len(units) < len(self) or len(options) != 1:
            return super().forward(x)
        ((skip, recompute),) = options
        return rcu_run(x, [unit.parameters_in_order() for unit in units], skip, recompute)


def _is_bare(unit: nn.Module) -> TypeGuard[ResidualConvUnit]:
    """Whether calling the unit does nothing but its own forward."""
    return type(unit) is ResidualConvUnit and is_bare(unit)


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing else: no hooks, no other forward, not compiled."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changed = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not any(hooks) and not changed and not _has_global_hooks()


def _has_global_hooks() -> bool:
    module = nn.modules.module
    return any((module._global_forward_hooks, module._global_forward_pre_hooks, module._global_backward_hooks,
                module._global_backward_pre_hooks))  # fmt: skip


class MultiResolutionFusion(nn.Module):
    """Multi-resolution fusion (section 3.2): a 3x3 convolution per path, all resized to the largest path, summed.

    Nothing in it is non-linear. Each path is convolved at its own resolution, then upsampled bilinearly.

    Args:
        in_channels: C_i of each path, one or more.
        channels: K, the channels of the result.
        align_corners: As in ``torch.nn.functional.interpolate``.
        kernel_size: 3, or 1 as in Light-Weight RefineNet.

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, align_corners: bool = True, kernel_size: int = 3
    ) -> None:
        super().__init__()
        self.in_channels = _channels(in_channels, "in_channels")
        check_positive(channels, "channels")
        check_kernel(kernel_size, "kernel_size")
        self.align_corners = _check.flag(align_corners, "align_corners")
        self.convs = nn.ModuleList(_conv(c, channels, kernel_size) for c in self.in_channels)

    def forward(
        self,
        xs: Sequence[Tensor],  # each (N, C_i, H_i, W_i)
    ) -> Tensor:  # (N, K, max H_i, max W_i)
        xs = _check_paths(xs, "xs", self.in_channels)
        return fuse(xs, _weights(self.convs), align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"


class ChainedResidualPooling(nn.Module):
    """Chained residual pooling (section 3.2): one ReLU, then 5x5 max pools and convolutions in a chain, all summed.

    Args:
        channels: C.
        stages: Links of the chain: 2 in the paper, 4 in the released networks.
        order: ``"pool-conv"``, or ``"conv-pool"`` (the paper's improved variant).
        kernel_size: 3, or 1 as in Light-Weight RefineNet (Nekrasov et al., BMVC 2018).

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
    """

    def __init__(self, channels: int, stages: int = 2, order: str = "pool-conv", kernel_size: int = 3) -> None:
        super().__init__()
        check_positive(channels, "channels")
        check_positive(stages, "stages")
        self.order = _check.choice(order, "order", ORDERS)
        check_kernel(kernel_size, "kernel_size")
        self.convs = nn.ModuleList(_conv(channels, channels, kernel_size) for _ in range(stages))

    def forward(
        self,
        x: Tensor,  # (N, C, H, W)
    ) -> Tensor:  # (N, C, H, W)
        return crp(x, _weights(self.convs), order=self.order)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


class RefineNetBlock(nn.Module):
    """One RefineNet block (section 3.2, figure 3): adapt, fuse, pool, output.

    Every path goes through residual conv units at its own width; a trunk's map is first brought to the block's width by
    a convolution without bias. A block with a single path has no fusion.

    Args:
        trunk_channels: C_i of the trunk maps that the block reads.
        channels: The block's width: 512 in the paper's deepest block, 256 in the others.
        previous_channels: Width of the previous block's output, which then is the last path; None for the first block.
        crp_stages: Stages of chained residual pooling.
        output_units: Residual conv units at the end: 1, and 3 in the last block.
        align_corners: Of the fusion's bilinear upsampling.
        adaptive_units: Residual conv units of each path: 2, and 0 in Light-Weight RefineNet.
        kernel_size: Of the adaptive and the fusion's convolutions: 3, and 1 in Light-Weight RefineNet.
        crp_order, crp_kernel: As ``order`` and ``kernel_size`` of :class:`ChainedResidualPooling`.
        rcu_bias, rcu_skip, rcu_recompute: As ``bias``, ``skip`` and ``recompute`` of :class:`ResidualConvUnit`.

    Raises:
        TypeError, ValueError: An argument is not of this form; names it, what was expected and what came.
    """

    def __init__(
        self,
        trunk_channels: Sequence[int],
        channels: int,
        previous_channels: int | None = None,
        crp_stages: int = 2,
        output_units: int = 1,
        align_corners: bool = True,
        *,
        adaptive_units: int = 2,
        kernel_size: int = 3,
        crp_order: str = "pool-conv",
        crp_kernel: int = 3,
        rcu_bias: tuple[bool, bool] = (True, False),
        rcu_skip: str = "raw",
        rcu_recompute: bool = False,
    ) -> None:
        super().__init__()
        trunk_channels = _channels(trunk_channels, "trunk_channels")
        previous = [] if previous_channels is None else [check_positive(previous_channels, "previous_channels")]
        check_positive(channels, "channels")
        check_positive(crp_stages, "crp_stages")
        check_count(output_units, "output_units")
        check_count(adaptive_units, "adaptive_units")
        check_kernel(kernel_size, "kernel_size")

        def units(width: int, count: int) -> ResidualConvUnits:
            options = (width, rcu_bias, rcu_skip, rcu_recompute)
            return ResidualConvUnits(*(ResidualConvUnit(*options) for _ in range(count)))

        widths = [channels] * len(trunk_channels) + previous
        self.in_channels = [*trunk_channels, *previous]
        self.adapt = nn.ModuleList(_conv(c, channels, kernel_size) for c in trunk_channels)
        self.units = nn.ModuleList(units(width, adaptive_units) for width in widths)
        several = len(widths) > 1
        self.fusion = MultiResolutionFusion(widths, channels, align_corners, kernel_size) if several else None
        self.pooling = ChainedResidualPooling(channels, crp_stages, crp_order, crp_kernel)
        self.output = units(channels, output_units)

    def forward(
        self,
        maps: Sequence[Tensor],  # each (N, C_i, H_i, W_i): the trunk's, then the previous block's output
    ) -> Tensor:  # (N, channels, max H_i, max W_i)
        maps = _check_paths(maps, "maps", self.in_channels)
        from_trunk = len(self.adapt)
        maps = [conv(x) for conv, x in zip(self.adapt, maps[:from_trunk], strict=True)] + maps[from_trunk:]
        maps = [units(x) for units, x in zip(self.units, maps, strict=True)]
        y = maps[0] if self.fusion is None else self.fusion(maps)
        return self.output(self.pooling(y))


def _conv(in_channels: int, channels: int, kernel_size: int = 3, bias: bool = False) -> Convolution:
    """The decoder's convolutions have no bias unless something else is said."""
    return Convolution(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)


def _weights(convs: Iterable[Any]) -> list[Tensor]:
    return [conv.weight for conv in convs]


def check_positive(value: Any, argument: str) -> int:
    """``value`` if it is an integer >= 1."""
    value = _check.integer(value, argument)
    if value < 1:
        raise ValueError(f"{argument}: expected an integer >= 1, got {value}")
    return value


def check_count(value: Any, argument: str) -> int:
    """``value`` if it is an integer >= 0."""
    value = _check.integer(value, argument)
    if value < 0:
        raise ValueError(f"{argument}: expected an integer >= 0, got {value}")
    return value


def check_kernel(value: Any, argument: str) -> int:
    """``value`` if it is 1 or 3."""
    if check_positive(value, argument) not in (1, 3):
        raise ValueError(f"{argument}: expected 1 or 3, got {value!r}")
    return value


def _channels(value: Any, argument: str) -> list[int]:
    return [check_positive(c, f"{argument}[{i}]") for i, c in enumerate(_check.sequence(value, argument))]


def _pair(value: Any, argument: str) -> tuple[bool, bool]:
    if not isinstance(value, list | tuple) or [type(entry) for entry in value] != [bool, bool]:
        raise TypeError(f"{argument}: expected a pair of bools, got {value!r}")
    return value[0], value[1]


def _check_paths(
    xs: Any,  # each (N, C_i, H_i, W_i)
    argument: str,
    channels: list[int],
) -> list[Tensor]:
    """``xs`` as a list, if it has one (N, C_i, H_i, W_i) for each of ``channels``."""
    xs = _check.sequence(xs, argument)
    if len(xs) != len(channels):
        raise ValueError(f"{argument}: expected {len(channels)} maps, one a path, got {len(xs)}")
    for i, (x, c) in enumerate(zip(xs, channels, strict=True)):
        if _check.image(x, f"{argument}[{i}]").shape[1] != c:
            raise ValueError(f"{argument}[{i}]: expected {c} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
    return xs
