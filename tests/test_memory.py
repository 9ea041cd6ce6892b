"""What a training step holds, against the same network in plain PyTorch; and that computing again changes no bit.

Counted with tensors that have sizes and no memory, so the networks are those that people train.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("timm")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
bench_train = pytest.importorskip("bench_train", reason="needs the checkout's benchmarks/")

from common import assert_same_bits  # noqa: E402
from refinenet_fast import RefineNet  # noqa: E402
from refinenet_fast.training.memory import LiveBytes, step_bytes  # noqa: E402

CLASSES = 21
PRECISIONS = ["float32", "bfloat16"]


def network(kind: str, **options) -> RefineNet:
    made = RefineNet(CLASSES, freeze_bn=True, **{"trunk": "resnet50", **options})
    return bench_train.plain(made) if kind == "plain" else made


def decoder_bytes(made: RefineNet, precision: str) -> int:
    return bench_train.decoder_bytes(made, (1, 3, 256, 256), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stages", [2, 4])
def test_the_decoder_saves_little(stages, precision):
    options = {"crp_stages": stages}
    ours, eager = (decoder_bytes(network(kind, **options), precision) for kind in ("ours", "plain"))
    kept = decoder_bytes(network("ours", recompute_units=False, **options), precision)
    assert 0 < ours <= 0.55 * eager and ours < kept <= 0.75 * eager


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trunk, stages", [("resnet50", 2), ("resnet101", 4)])
def test_a_whole_step_needs_little(trunk, stages, precision):
    """Its peak, gradients included; four images of 512x512."""

    def step(kind: str, **options) -> int:
        made = network(kind, trunk=trunk, crp_stages=stages, **options)
        return step_bytes(made, 4, (512, 512), precision)

    eager = step("plain")
    assert step("ours") <= 0.8 * eager
    assert step("ours", checkpoint_blocks=True) <= 0.6 * eager


def test_live_bytes_follow_tensors():
    x = torch.ones(256)
    with LiveBytes() as live:
        y = x + 1
        assert (live.now, live.peak) == (1024, 1024)
        view, y = y.view(16, 16), y.mul_(2)
        assert live.now == 1024
        z = x.double()
        del view, y
        assert (live.now, live.peak) == (2048, 3072)
        del z
    assert live.now == 0


def test_step_bytes_are_those_of_a_real_step():
    """But for what kernels need while they run: 15 percent here."""
    made = RefineNet(CLASSES, "test_resnet", width=16, deep_width=16, dropout=0.0).train()
    expected = step_bytes(made, 2, (96, 96))
    images, labels = torch.randn(2, 3, 96, 96), torch.zeros(2, 96, 96, dtype=torch.int64)
    with LiveBytes() as live:
        F.cross_entropy(made(images), labels).backward()
    assert live.peak == pytest.approx(expected, rel=0.15)


# -- the same bits ----------------------------------------------------------------------------------------------------


def trained(**options) -> list[Tensor]:
    """Two steps of a small network with live batch norm and dropout: losses, gradients, and all that a step changes."""
    torch.manual_seed(0)
    made = RefineNet(5, "test_resnet", width=8, deep_width=8, dropout=0.3, init="kaiming", **options).train()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    images, labels = torch.randn(2, 3, 64, 48), torch.randint(5, (2, 64, 48))
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(made(images), labels)
        loss.backward()
        optimizer.step()
        found += [loss.detach(), *(p.grad for p in made.parameters())]
    return [*found, *made.state_dict().values()]


@pytest.mark.parametrize(
    "options",
    [
        {"recompute_units": False},
        {"checkpoint_blocks": True},
        {"checkpoint_blocks": True, "scales": (1.0, 0.5), "share_trunk": True},
        {"checkpoint_blocks": True, "recompute_units": False, "cascades": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_is_computed_again_changes_no_bit(options, one_thread):
    """Dropout's numbers and batch norm's running statistics among them."""
    same = {k: v for k, v in options.items() if k not in ("recompute_units", "checkpoint_blocks")}
    assert_same_bits(trained(**options), trained(**same))


def test_a_trunk_that_is_no_row_of_stages(one_thread):
    """timm's MobileNet-v2: computed again as a whole."""
    torch.manual_seed(0)
    made = RefineNet(3, "mobilenetv2_100", light_weight=True, width=8, dropout=0.0).train()
    images, states = torch.randn(2, 3, 64, 64), []
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for again in (False, True):
        made.load_state_dict(before)
        made.checkpoint_blocks = again
        made.zero_grad()
        made(images).square().mean().backward()
        states.append([*(p.grad for p in made.parameters()), *(v.clone() for v in made.state_dict().values())])
    assert_same_bits(*states)


@pytest.mark.slow
def test_compiled(one_thread):
    """Frozen batch norm; a compiled step that computes blocks again has eager's gradients."""
    torch.manual_seed(0)
    made = RefineNet(3, "test_resnet", width=8, deep_width=8, dropout=0.0, freeze_bn=True, checkpoint_blocks=True)
    images = torch.randn(2, 3, 64, 64)
    found = []
    for run in (made, torch.compile(made, backend="aot_eager")):
        made.zero_grad()
        run(images).square().mean().backward()
        found.append([p.grad.clone() for p in made.parameters() if p.requires_grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
