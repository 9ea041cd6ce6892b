"""Decoders' blocks as their authors' code has them, where no package installs it: MiDaS, DPT, VGGT, CroCo, Depth Pro,
RefineNet.

Names of classes, children and arguments are those of the originals, and so is what is computed; the code is not. At the
end, weights for them and maps, and what accelerating them must not change.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinenet_fast import accelerate, explain
from refinenet_fast.testing import relative_l2


def conv3x3(c: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(c, c, 3, padding=1, bias=bias)


class ResidualConvUnit(nn.Module):
    """MiDaS v2.1 and VGGT, whose ReLU works in place; with batch norm, and out of place, isl-org/DPT and CroCo."""

    def __init__(self, features: int, activation: nn.Module, bn: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3x3(features, not bn), conv3x3(features, not bn)
        if bn:
            self.bn1, self.bn2 = nn.BatchNorm2d(features), nn.BatchNorm2d(features)
        self.bn, self.activation, self.skip_add = bn, activation, nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        out = self.conv1(self.activation(x))
        out = self.bn1(out) if self.bn else out
        out = self.conv2(self.activation(out))
        out = self.bn2(out) if self.bn else out
        return self.skip_add.add(out, x)


class ResidualConvUnit_custom(ResidualConvUnit):
    """The name that MiDaS v3, isl-org/DPT and CroCo gave theirs."""


class FeatureFusionBlock(nn.Module):
    """MiDaS v2.1: doubles, no projection."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.resConfUnit1 = ResidualConvUnit(features, nn.ReLU(inplace=True))
        self.resConfUnit2 = ResidualConvUnit(features, nn.ReLU(inplace=True))

    def forward(self, *xs: Tensor) -> Tensor:  # (N, C, H, W) each; (N, C, 2 H, 2 W)
        output = xs[0]
        if len(xs) == 2:
            output = output + self.resConfUnit1(xs[1])
        return F.interpolate(self.resConfUnit2(output), scale_factor=2, mode="bilinear", align_corners=True)


class FeatureFusionBlock_custom(nn.Module):
    """MiDaS v3, isl-org/DPT, Depth Anything, VGGT (in place; the deepest without a skip)."""

    def __init__(
        self,
        features: int,
        bn: bool = False,
        expand: bool = False,
        align_corners: bool = True,
        size: tuple[int, int] | None = None,
        inplace: bool = False,
        has_residual: bool = True,
        width_ratio: float = 1,
    ) -> None:
        super().__init__()
        self.align_corners, self.size, self.width_ratio = align_corners, size, width_ratio
        self.out_conv = nn.Conv2d(features, features // 2 if expand else features, 1)
        activation = nn.ReLU(inplace=inplace)
        if has_residual:
            self.resConfUnit1 = ResidualConvUnit_custom(features, activation, bn)
        self.resConfUnit2 = ResidualConvUnit_custom(features, activation, bn)
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, *xs: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # (N, C, H, W) each; (N, K, H', W')
        output = xs[0]
        if len(xs) == 2:
            output = self.skip_add.add(output, self.resConfUnit1(xs[1]))
        output = self.resConfUnit2(output)
        size = size or self.size or (2 * output.shape[2], int(self.width_ratio * 2 * output.shape[3]))
        output = F.interpolate(output, size, mode="bilinear", align_corners=self.align_corners)
        return self.out_conv(output)


class FeatureFusionBlock_vggt(FeatureFusionBlock_custom):
    """VGGT, where it is called ``FeatureFusionBlock``: a block with a unit for a skip has to be given one."""

    def forward(self, *xs: Tensor, size: tuple[int, int] | None = None) -> Tensor:  # (N, C, H, W) each; (N, K, H', W')
        maps = (xs[0], xs[1]) if hasattr(self, "resConfUnit1") else xs[:1]
        return super().forward(*maps, size=size)


class FeatureFusionBlock_croco(FeatureFusionBlock_custom):
    """CroCo and DUSt3R, where it is called ``FeatureFusionBlock_custom``: doubles, or widens to another aspect."""

    def forward(self, *xs: Tensor) -> Tensor:  # (N, C, H, W) each; (N, K, H', W')
        output = xs[0]
        if len(xs) == 2:
            residual = self.resConfUnit1(xs[1])
            if self.width_ratio != 1:
                residual = F.interpolate(residual, output.shape[2:], mode="bilinear")
            output = self.skip_add.add(output, residual)
        output = self.resConfUnit2(output)
        height, width = output.shape[2:]
        if self.width_ratio != 1:
            narrow = width / height < 2 / 3 * self.width_ratio
            size = (2 * height, 3 * width if narrow else int(self.width_ratio * 2 * height))
            return self.out_conv(F.interpolate(output, size, mode="bilinear"))
        return self.out_conv(F.interpolate(output, scale_factor=2, mode="bilinear", align_corners=self.align_corners))


class ResidualBlock(nn.Module):
    """Depth Pro's own code, where it is built by the fusion block."""

    def __init__(self, features: int, bn: bool) -> None:
        super().__init__()
        norm = [nn.BatchNorm2d(features)] if bn else []
        layers = [layer for _ in range(2) for layer in (nn.ReLU(False), conv3x3(features, not bn), *norm)]
        self.residual, self.shortcut = nn.Sequential(*copy.deepcopy(layers)), None

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        delta = self.residual(x)
        return (x if self.shortcut is None else self.shortcut(x)) + delta


class FeatureFusionBlock2d(nn.Module):
    """Depth Pro's own code: a transposed convolution doubles; the finest lacks it."""

    def __init__(self, features: int, deconv: bool = True, bn: bool = False) -> None:
        super().__init__()
        self.resnet1, self.resnet2 = ResidualBlock(features, bn), ResidualBlock(features, bn)
        self.use_deconv = deconv
        if deconv:
            self.deconv = nn.ConvTranspose2d(features, features, 2, stride=2, bias=False)
        self.out_conv = nn.Conv2d(features, features, 1)
        self.skip_add = nn.quantized.FloatFunctional()

    def forward(self, x0: Tensor, x1: Tensor | None = None) -> Tensor:  # (N, C, H, W) each; (N, C, H', W')
        x = x0 if x1 is None else self.skip_add.add(x0, self.resnet1(x1))
        x = self.resnet2(x)
        return self.out_conv(self.deconv(x) if self.use_deconv else x)


class RCUBlock(nn.Module):
    """refinenet-pytorch: residual conv units in a row."""

    def __init__(self, planes: int, n_blocks: int, n_stages: int = 2) -> None:
        super().__init__()
        self.n_blocks, self.n_stages = n_blocks, n_stages
        self.suffixes = ["_conv", "_conv_relu_varout_dimred", "_conv_more"][:n_stages]
        for i in range(n_blocks):
            for j, suffix in enumerate(self.suffixes):
                self.add_module(f"{i + 1}{suffix}", conv3x3(planes, bias=j == 0))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        for i in range(self.n_blocks):
            residual = x
            for suffix in self.suffixes:
                x = getattr(self, f"{i + 1}{suffix}")(F.relu(x))
            x = x + residual
        return x


class CRPBlock(nn.Module):
    """refinenet-pytorch (3x3) and light-weight-refinenet (1x1): chained residual pooling of what has been ReLU'd."""

    def __init__(self, planes: int, n_stages: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.n_stages = n_stages
        for i in range(n_stages):
            conv = nn.Conv2d(planes, planes, kernel_size, padding=kernel_size // 2, bias=False)
            self.add_module(f"{i + 1}_outvar_dimred", conv)
        self.maxpool = nn.MaxPool2d(kernel_size=5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        top = x
        for i in range(self.n_stages):
            top = getattr(self, f"{i + 1}_outvar_dimred")(self.maxpool(top))
            x = top + x
        return x


class ChainedResidualPool(nn.Module):
    """pytorch_refinenet: its ReLU is inside, and works in place."""

    def __init__(self, feats: int, pool_first: bool = True, inplace: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=inplace)
        for i in range(1, 4):
            stage = nn.MaxPool2d(kernel_size=5, stride=1, padding=2), conv3x3(feats, bias=False)
            self.add_module(f"block{i}", nn.Sequential(*(stage if pool_first else stage[::-1])))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        x = path = self.relu(x)
        for i in range(1, 4):
            path = getattr(self, f"block{i}")(path)
            x = x + path
        return x


class Decoder(nn.Module):
    """A decoder of two fusions with a 3x3 convolution at either end, and one of stride 2 that no op takes."""

    def __init__(self, block: type[nn.Module], features: int = 8, **options: object) -> None:
        super().__init__()
        self.layer_rn = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1, bias=False) for _ in range(2))
        self.down = nn.Conv2d(features, features, 3, stride=2, padding=1)
        self.refinenet2, self.refinenet1 = block(features, **options), block(features, **options)
        self.output_conv = nn.Sequential(nn.Conv2d(features, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), H and W even; (N, 1, 2 H, 2 W)
        fine, coarse = self.layer_rn[0](x), self.layer_rn[1](self.down(x))
        return self.output_conv(self.refinenet1(self.refinenet2(coarse), fine))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval, with normal weights, biases and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (p[0].numel() ** 0.5 if p.dim() > 1 else 2))
        for b in model.buffers():
            if b.is_floating_point():
                b.copy_(torch.randn(b.shape, generator=generator).abs() + 0.5)
    return model.eval()


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def gradients(model: nn.Module, *xs: Tensor) -> list[Tensor]:
    """The result and the gradient of every parameter that takes part in it."""
    y = model(*xs)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(y, list(model.parameters()), gy, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def assert_same(model: nn.Module, *shapes: tuple[int, ...]) -> None:
    """Accelerated, the model computes what it did, forward and backward, in float32 and in float64."""
    fast = accelerate(model, copy=True)
    for shape in shapes:
        for dtype, limits in ((torch.float32, (1e-4, 1e-3)), (torch.float64, (1e-10, 1e-10))):
            x = image(*shape, dtype=dtype)
            want, got = gradients(copy.deepcopy(model).to(dtype), x), gradients(copy.deepcopy(fast).to(dtype), x)
            assert len(want) == len(got)
            assert relative_l2(got[0], want[0]) <= limits[0]
            assert max(map(relative_l2, got[1:], want[1:])) <= limits[1]


def replaced(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.op for row in explain(model)}
