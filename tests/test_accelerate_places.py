"""``accelerate`` where models run: on a CPU, on a GPU, compiled, under autocast, on two devices, in two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ports
from ports import randomised
from refinenet_fast import accelerate, explain
from refinenet_fast.testing import relative_l2

NEEDS_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DECODERS = {
    "MiDaS v2.1": lambda: ports.Decoder(ports.FeatureFusionBlock),
    "isl-org/DPT, batch norm": lambda: ports.Decoder(ports.FeatureFusionBlock_custom, bn=True),
    "Depth Anything": lambda: ports.Decoder(ports.FeatureFusionBlock_custom, align_corners=False),
    "RefineNet": lambda: nn.Sequential(ports.RCUBlock(8, 2), nn.ReLU(), ports.CRPBlock(8, 2)),
}
PLACES = pytest.mark.parametrize(  # on the CPU other files have the others
    ("name", "device"),
    [("isl-org/DPT, batch norm", "cpu"), *(pytest.param(name, "cuda", marks=NEEDS_A_GPU) for name in DECODERS)],
)
pytestmark = pytest.mark.usefixtures("exact", "one_thread")


def image(*shape: int, device: str = "cpu") -> Tensor:
    return ports.image(*shape).to(device)


def decoders(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """One, and its accelerated copy."""
    model = randomised(DECODERS[name]()).to(device)
    fast = accelerate(model, copy=True)
    assert all(row.op is not None and row.reason is None for row in explain(fast))
    return model, fast


def step(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of the parameters that take part in it."""
    y = model(x)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, parameters, gy, allow_unused=True)
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def assert_close(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    assert len(got) == len(want)
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert [g.device for g in got] == [w.device for w in want]
    assert max(map(relative_l2, got, want)) <= limit


@PLACES
def test_a_training_step(name, device):
    model, fast = decoders(name, device)
    x = image(2, 8, 6, 10, device=device)
    assert_close(step(fast, x, list(fast.parameters())), step(model, x, list(model.parameters())), 1e-3)


@PLACES
def test_a_compiled_training_step(name, device):
    """One graph; on the CPU as it is traced, on a GPU by Inductor."""
    model, fast = decoders(name, device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    x = image(2, 8, 6, 10, device=device)
    assert_close(step(compiled, x, list(fast.parameters())), step(model, x, list(model.parameters())), 1e-3)


@PLACES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(name, dtype, device):
    """Types are PyTorch's on that device, whose rules differ, and results no worse."""
    model, fast = decoders(name, device)
    x = image(2, 8, 6, 10, device=device)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast(device, dtype):
        theirs, ours = model(x), fast(x)
    assert ours.dtype == theirs.dtype and ours.device == theirs.device
    assert relative_l2(ours, truth) <= 2 * relative_l2(theirs, truth)
    ours.float().square().mean().backward()
    for p in fast.parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())


class To(nn.Module):
    """As models that are too large for a device are spread over several."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x.to(self.device)


@pytest.mark.parametrize(
    "devices",
    [
        ("cpu", "cpu"),
        pytest.param(("cpu", "cuda:0"), marks=NEEDS_A_GPU),
        pytest.param(
            ("cuda:0", "cuda:1"),
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
    ids=str,
)
def test_a_model_on_two_devices(devices):
    parts = [randomised(ports.FeatureFusionBlock_custom(8)).to(device) for device in devices]
    model = nn.Sequential(parts[0], To(devices[1]), parts[1])
    fast = accelerate(model, copy=True)
    assert all(row.op is not None and row.reason is None for row in explain(fast))
    x = image(1, 8, 6, 4, device=devices[0])
    assert_close(step(fast, x, list(fast.parameters())), step(model, x, list(model.parameters())), 1e-3)


def _decoder() -> nn.Module:
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom))
    del model.refinenet2.resConfUnit1  # takes no part: DistributedDataParallel would wait for it
    return model


def _rank(rank: int, folder: str) -> None:
    """Gradients of two steps with an image of its own: accelerated before the model is wrapped, and afterwards."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    found = []
    for before in (True, False):
        model = _decoder()
        if rank == 1:  # DDP hands out the weights of rank 0
            nn.init.zeros_(model.output_conv[0].weight)
        parallel = nn.parallel.DistributedDataParallel(accelerate(model) if before else model)
        accelerate(parallel)
        parallel(image(2, 8, 6, 4)[rank : rank + 1]).square().mean().backward()
        found.append([[row.op for row in explain(model)], [p.grad for p in model.parameters()]])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks(tmp_path: Path):
    """Both replace the same blocks and get the same gradients, the mean of what the model gives as it was."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    model = _decoder()
    for x in image(2, 8, 6, 4):
        (model(x[None]).square().mean() / 2).backward()
    wanted = [p.grad for p in model.parameters()]
    for (ops, grads), (other_ops, other) in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True):
        assert ops == other_ops and set(ops) == {"conv3x3", "rcu", "rcu, fuse"}
        assert all(map(torch.equal, grads, other))
        assert_close(grads, wanted, 1e-3)
