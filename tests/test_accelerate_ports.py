"""``accelerate`` on blocks as their authors' code has them, and on copies under other names."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import ports
from ports import assert_same, image, randomised, replaced
from refinenet_fast import accelerate, explain
from refinenet_fast.testing import relative_l2

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(6, 4), (14, 10), (2, 18)]


@pytest.mark.parametrize("bn", [False, True])
def test_depth_pros_own_code(bn):
    model = randomised(ports.Decoder(ports.FeatureFusionBlock2d, bn=bn))
    assert_same(model, *((2, 8, *size) for size in SIZES))
    fast = accelerate(model)
    assert replaced(fast) == {
        "layer_rn.0": "conv3x3",
        "layer_rn.1": "conv3x3",
        "output_conv.0": "conv3x3",
        **{f"refinenet{k}": "rcu, fuse" for k in (1, 2)},
        **{f"refinenet{k}.resnet{i}": "rcu" for k in (1, 2) for i in (1, 2)},
    }
    assert all(row.reason is None for row in explain(fast))


class DUSt3R(ports.Decoder):
    """Odd grids: the map from below is cut to the skip's size. The deepest fusion's first unit is taken away."""

    def __init__(self, bn: bool) -> None:
        super().__init__(ports.FeatureFusionBlock_croco, bn=bn)
        del self.refinenet2.resConfUnit1

    def forward(self, x: Tensor) -> Tensor:  # (N, 8, H, W); (N, 1, 2 H, 2 W)
        below = self.refinenet2(self.layer_rn[1](self.down(x)))
        return self.output_conv(self.refinenet1(below[:, :, : x.shape[2], : x.shape[3]], self.layer_rn[0](x)))


@pytest.mark.parametrize("bn", [False, True])
def test_croco_and_dust3r(bn):
    model = randomised(DUSt3R(bn))
    assert_same(model, (2, 8, 7, 5), (2, 8, 3, 9), (2, 8, 6, 4))
    assert replaced(accelerate(model)) == {
        "layer_rn.0": "conv3x3",
        "layer_rn.1": "conv3x3",
        "output_conv.0": "conv3x3",
        "refinenet1": "rcu, fuse",
        "refinenet1.resConfUnit1": "rcu",
        "refinenet1.resConfUnit2": "rcu",
        "refinenet2": "rcu, fuse",
        "refinenet2.resConfUnit2": "rcu",
    }


def test_crocos_fusion_to_another_aspect_is_left_alone_and_its_units_are_not():
    model = randomised(ports.FeatureFusionBlock_croco(8, width_ratio=1.5))
    fast = accelerate(model, copy=True)
    rows = {row.name: row for row in explain(fast)}
    assert rows[""].op is None and "not that of rcu, fuse" in rows[""].reason
    assert rows["resConfUnit1"].op == rows["resConfUnit2"].op == "rcu"
    x, skip = image(2, 8, 4, 5), image(2, 8, 4, 6)
    assert relative_l2(fast(x, skip), model(x, skip)) < 1e-6


def test_depth_pros_finest_fusion_does_not_upsample():
    block = randomised(ports.FeatureFusionBlock2d(6, deconv=False))
    fast = accelerate(block, copy=True)
    assert replaced(fast) == {"": "rcu, fuse", "resnet1": "rcu", "resnet2": "rcu"}
    x, skip = image(1, 6, 5, 4), image(1, 6, 5, 4) + 1
    assert relative_l2(fast(x0=x, x1=skip), block(x, skip)) < 1e-6


def test_the_convolutions_of_a_block_that_is_left_alone_run_on_the_op():
    """Of those that are its own, and of the deeper: a block that is no residual conv unit hides none."""
    other = nn.Sequential(ports.ResidualConvUnit(8, nn.GELU()), ports.ResidualConvUnit(8, nn.ReLU()))
    model = randomised(other)
    assert_same(model, (2, 8, 6, 4))
    fast = accelerate(model)
    assert replaced(fast) == {"0": None, "0.conv1": "conv3x3", "0.conv2": "conv3x3", "1": "rcu"}
    accelerate(fast)
    assert replaced(fast) == {"0": None, "0.conv1": "conv3x3", "0.conv2": "conv3x3", "1": "rcu"}


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_pytorch_refinenets_blocks(pool_first, bias):
    model = nn.Sequential(
        ports.ResidualConvUnit(6, nn.ReLU(inplace=True)), ports.ChainedResidualPool(6, pool_first), nn.Conv2d(6, 6, 1)
    )
    if not bias:
        model[0].conv2 = ports.conv3x3(6, bias=False)
    assert_same(randomised(model), *((2, 6, *size) for size in SIZES))
    assert replaced(accelerate(model)) == {"0": "rcu", "1": "crp"}


class Residual(nn.Module):
    """A unit under a name of its own, its batch norms too."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = ports.conv3x3(8, bias=False), ports.conv3x3(8, bias=False)
        self.bn1, self.bn2, self.factor = nn.BatchNorm2d(8), nn.BatchNorm2d(8), factor

    def forward(self, x: Tensor) -> Tensor:  # (N, 8, H, W), both
        return x + self.factor * self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class Refine(ports.FeatureFusionBlock_custom):
    """The fusion block under a name of its own, with such units."""

    def __init__(self) -> None:
        super().__init__(8)
        self.resConfUnit1, self.resConfUnit2 = Residual(), Residual()


def test_copies_under_other_names():
    model = randomised(nn.Sequential(Refine(), Residual()))
    assert_same(model, (2, 8, 6, 4))
    assert replaced(accelerate(model)) == {
        "0": "rcu, fuse", "0.resConfUnit1": "rcu", "0.resConfUnit2": "rcu", "1": "rcu",
    }  # fmt: skip


def test_what_has_a_units_parts_and_another_meaning_is_left_alone_and_named():
    model = randomised(nn.Sequential(Residual(factor=0.5), Residual()))
    accelerate(model)
    rows = {row.name: row for row in explain(model)}
    assert rows["0"].op is None and "not that of rcu" in rows["0"].reason
    assert rows["0.conv1"].op == "conv3x3" and rows["1"].op == "rcu"


class Scaled(Residual):
    """One parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(Tensor([1.0]))


def test_what_has_other_parameters_is_no_block():
    model = randomised(nn.Sequential(Scaled(), Residual()))
    assert replaced(accelerate(model)) == {"0.conv1": "conv3x3", "0.conv2": "conv3x3", "1": "rcu"}


@pytest.mark.parametrize("conv2", [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)])
def test_two_convolutions_that_no_unit_has_are_no_block(conv2):
    """As those of ZoeDepth's projectors: there are too many to name."""
    model = nn.Sequential(Residual(), Residual())
    model[0].conv2 = conv2
    names = replaced(accelerate(randomised(model)))
    assert "0" not in names and names["1"] == "rcu"


def test_where_all_are_left_alone_the_warning_says_what_was_looked_for():
    model = randomised(ports.ResidualConvUnit(8, nn.GELU()))
    with pytest.warns(UserWarning, match=r"named .*ResidualConvUnit.* all of the 1 found .*explain\(model\) says why"):
        assert accelerate(model) is model
