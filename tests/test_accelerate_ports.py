"""``accelerate`` on blocks as their authors' code has them: Depth Pro's own."""

from __future__ import annotations

import pytest
from torch import nn

import ports
from ports import assert_same, image, randomised, replaced
from refinenet_fast import accelerate, explain
from refinenet_fast.testing import relative_l2

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
