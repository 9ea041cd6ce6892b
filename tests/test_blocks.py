"""The blocks against the same computation written out in plain PyTorch, in float64: results and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinenet_fast.blocks import (
    ChainedResidualPooling,
    Convolution,
    MultiResolutionFusion,
    RefineNetBlock,
    ResidualConvUnit,
)

SIZES = [(1, 1), (1, 7), (5, 3), (13, 17)]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def randomised(module: nn.Module) -> nn.Module:
    """Weights and biases that keep the signal's scale, so that no path hides behind another."""
    generator = torch.Generator().manual_seed(1)
    for p in module.double().parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale
    return module


def assert_same(module: nn.Module, plain: Callable[..., Tensor], xs: Sequence[Tensor]) -> None:
    """``module`` and ``plain``, called alike: the same result and gradients in all of ``xs`` and all parameters."""
    argument = list(xs) if isinstance(module, MultiResolutionFusion | RefineNetBlock) else xs[0]
    y, expected = module(argument), plain(argument)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    inputs = [*xs, *module.parameters()]
    gy = images(*expected.shape, seed=2).detach()
    for name, g, e in zip(
        [f"xs[{i}]" for i in range(len(xs))] + [name for name, _ in module.named_parameters()],
        torch.autograd.grad(y, inputs, gy),
        torch.autograd.grad(expected, inputs, gy),
        strict=True,
    ):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)


def plain_rcu(unit: ResidualConvUnit, x: Tensor) -> Tensor:
    skip = x if unit.skip == "raw" else F.relu(x)
    return skip + conv(unit.conv2, F.relu(conv(unit.conv1, F.relu(x))))


def plain_fusion(fusion: MultiResolutionFusion, xs: Sequence[Tensor]) -> Tensor:
    size = (max(x.shape[2] for x in xs), max(x.shape[3] for x in xs))
    paths = [conv(layer, x) for layer, x in zip(fusion.convs, xs, strict=True)]
    corners = fusion.align_corners
    return sum(F.interpolate(t, size, mode="bilinear", align_corners=corners) for t in paths)


def plain_crp(pooling: ChainedResidualPooling, x: Tensor) -> Tensor:
    t = y = F.relu(x)
    for layer in pooling.convs:
        if pooling.order == "pool-conv":
            t = conv(layer, F.max_pool2d(t, 5, stride=1, padding=2))
        else:
            t = F.max_pool2d(conv(layer, t), 5, stride=1, padding=2)
        y = y + t
    return y


def plain_block(block: RefineNetBlock, maps: Sequence[Tensor]) -> Tensor:
    maps = list(maps)
    for i, layer in enumerate(block.adapt):
        maps[i] = conv(layer, maps[i])
    for i, (first, second) in enumerate(block.units):
        maps[i] = plain_rcu(second, plain_rcu(first, maps[i]))
    y = maps[0] if len(maps) == 1 else plain_fusion(block.fusion, maps)
    y = plain_crp(block.pooling, y)
    for unit in block.output:
        y = plain_rcu(unit, y)
    return y


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("skip", ["raw", "relu"])
def test_residual_conv_unit(size, bias, skip):
    unit = randomised(ResidualConvUnit(6, bias, skip))
    assert (unit.conv1.bias is not None, unit.conv2.bias is not None) == bias
    assert_same(unit, lambda x: plain_rcu(unit, x), [images(2, 6, *size)])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("sizes", [[(5, 7)], [(13, 17), (7, 9)], [(2, 3), (9, 8), (9, 8), (1, 1)]])
def test_multi_resolution_fusion(sizes, align_corners):
    channels = [3, 5, 4, 6][: len(sizes)]
    fusion = randomised(MultiResolutionFusion(channels, 4, align_corners))
    xs = [images(2, c, *size, seed=c) for c, size in zip(channels, sizes, strict=True)]
    assert_same(fusion, lambda xs: plain_fusion(fusion, xs), xs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ["pool-conv", "conv-pool"])
@pytest.mark.parametrize("stages, kernel_size", [(1, 3), (2, 3), (4, 1)])
def test_chained_residual_pooling(size, order, stages, kernel_size):
    pooling = randomised(ChainedResidualPooling(5, stages, order, kernel_size))
    assert_same(pooling, lambda x: plain_crp(pooling, x), [images(2, 5, *size)])


@pytest.mark.parametrize(
    "trunk_channels, previous, sizes",
    [([12], None, [(3, 5)]), ([6], 8, [(9, 13), (5, 7)]), ([3, 6], 8, [(17, 9), (9, 5), (5, 3)])],
    ids=["first", "later", "two trunk maps"],
)
def test_refinenet_block(trunk_channels, previous, sizes):
    block = randomised(RefineNetBlock(trunk_channels, 4, previous, crp_stages=3, output_units=2))
    channels = [*trunk_channels, *([] if previous is None else [previous])]
    xs = [images(2, c, *size, seed=c) for c, size in zip(channels, sizes, strict=True)]
    assert_same(block, lambda xs: plain_block(block, xs), xs)


def test_previous_output_has_no_adaptive_convolution_and_keeps_its_width():
    block = RefineNetBlock([6], 4, previous_channels=8)
    assert len(block.adapt) == 1
    assert block.units[1][0].conv1.weight.shape == (8, 8, 3, 3)
    assert block.fusion.convs[1].weight.shape == (4, 8, 3, 3)


def test_parameters_are_those_of_ordinary_convolutions():
    unit = ResidualConvUnit(4)
    assert list(unit.state_dict()) == ["conv1.weight", "conv1.bias", "conv2.weight"]
    parametrized = nn.utils.parametrizations.weight_norm(ResidualConvUnit(4).conv1)
    assert isinstance(parametrized, nn.Conv2d)


def test_weight_norm_reaches_the_op():
    unit = ResidualConvUnit(4)
    x = torch.randn(1, 4, 6, 6)
    before = unit(x)
    nn.utils.parametrizations.weight_norm(unit.conv1)
    torch.testing.assert_close(unit(x), before)
    unit.conv1.parametrizations.weight.original0.data.mul_(2)
    assert not torch.allclose(unit(x), before)


def test_block_compiles_without_graph_breaks():
    block = randomised(RefineNetBlock([6], 4, 8)).float()
    xs = [images(1, 6, 9, 13).float().detach(), images(1, 8, 5, 7).float().detach()]
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(xs), block(xs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: ResidualConvUnit(0), ValueError, "channels: expected an integer >= 1, got 0"),
        (lambda: ResidualConvUnit(4.0), TypeError, "channels: expected an integer, got 4.0"),
        (lambda: ResidualConvUnit(4, bias=True), TypeError, "bias: expected a pair of bools, got True"),
        (lambda: ResidualConvUnit(4, skip="none"), ValueError, "skip: expected one of 'raw', 'relu', got 'none'"),
        (lambda: MultiResolutionFusion([], 4), ValueError, "in_channels: expected at least one entry"),
        (lambda: MultiResolutionFusion([4, -1], 4), ValueError, r"in_channels\[1\]: expected an integer >= 1, got -1"),
        (lambda: MultiResolutionFusion([4], True), TypeError, "channels: expected an integer, got True"),
        (lambda: ChainedResidualPooling(4, stages=0), ValueError, "stages: expected an integer >= 1, got 0"),
        (lambda: ChainedResidualPooling(4, order="both"), ValueError, "order: expected one of 'pool-conv'"),
        (lambda: ChainedResidualPooling(4, kernel_size=5), ValueError, "kernel_size: expected 1 or 3, got 5"),
        (lambda: RefineNetBlock(8, 4), TypeError, "trunk_channels: expected a list or tuple, got int"),
        (lambda: RefineNetBlock([8], 4, 0), ValueError, "previous_channels: expected an integer >= 1, got 0"),
        (lambda: RefineNetBlock([8], 4, crp_stages=0), ValueError, "crp_stages: expected an integer >= 1, got 0"),
        (lambda: RefineNetBlock([8], 4, output_units=-1), ValueError, "output_units: expected an integer >= 0, got -1"),
    ],
)
def test_bad_construction(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    "maps, error, said",
    [
        (torch.zeros(1, 6, 4, 4), TypeError, "maps: expected a list or tuple, got Tensor"),
        ([torch.zeros(1, 6, 4, 4)], ValueError, "maps: expected 2 maps, one a path, got 1"),
        ([torch.zeros(1, 6, 4, 4), torch.zeros(1, 7, 2, 2)], ValueError, r"maps\[1\]: expected 8 channels, got 7"),
        ([torch.zeros(6, 4, 4), torch.zeros(1, 8, 2, 2)], ValueError, r"maps\[0\]: expected 4 dimensions"),
    ],
)
def test_bad_maps(maps, error, said):
    with pytest.raises(error, match=said):
        RefineNetBlock([6], 4, 8)(maps)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_is_an_nn_conv2d(kernel, bias):
    layer = randomised(Convolution(3, 5, kernel, padding=kernel // 2, bias=bias))
    for size in SIZES:
        assert_same(layer, lambda x: conv(layer, x), [images(2, 3, *size)])
    plain = nn.Conv2d(3, 5, kernel, padding=kernel // 2, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    assert plain.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": (1, 3), "padding": (0, 1)},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolution_refuses_any_other(options):
    with pytest.raises(ValueError, match=r"expected a 3x3 convolution with padding 1, or a 1x1 one.* got Convolution"):
        Convolution(4, 8, **options)
    assert not Convolution.covers(nn.Conv2d(4, 8, **options))
