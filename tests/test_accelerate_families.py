"""``accelerate`` on whole networks of transformers and segmentation_models_pytorch, built from their configurations."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from refinenet_fast import accelerate, adapters, explain, restore, use_backend
from refinenet_fast.testing import relative_l2
from refinenet_fast.training.memory import LiveBytes

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
depth_models = pytest.importorskip("depth_models", reason="needs the checkout's benchmarks/")
pytest.importorskip("transformers")
pytest.importorskip("segmentation_models_pytorch")

import bench_accelerate  # noqa: E402
import harness  # noqa: E402
from depth_models import (  # noqa: E402
    TINY,
    chmv2,
    depth_anything,
    depth_pro,
    dpt,
    prompt_depth_anything,
    smp_dpt,
    tipsv2_dpt,
    zoedepth,
)

ODD = [(70, 98), (42, 126), (98, 42)]  # pixels; by patches of 14: 5x7, 3x9 and 7x3
BY_16 = [(48, 80), (80, 48), (112, 16)]
BY_32 = [(64, 96), (96, 32), (160, 32)]
SQUARES = [(48, 48), (80, 80), (112, 112)]  # where the network takes no others
FAMILIES = {  # how it is built, images, blocks replaced by op
    "depth_anything": (lambda: depth_anything(TINY), ODD, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "depth_anything, metric": (
        lambda: depth_anything(TINY, depth_estimation_type="metric", max_depth=20),
        ODD,
        {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6},
    ),
    "prompt_depth_anything": (
        lambda: prompt_depth_anything(TINY), ODD, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6},
    ),
    "dpt": (lambda: dpt(TINY), SQUARES, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "dpt, batch norm": (
        lambda: dpt(TINY, use_batch_norm_in_fusion_residual=True), SQUARES, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6},
    ),
    "zoedepth": (lambda: zoedepth(TINY), BY_16, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "chmv2": (lambda: chmv2(TINY), BY_16, {"rcu": 7, "rcu, fuse": 4, "conv3x3": 6}),
    "tipsv2_dpt": (lambda: tipsv2_dpt(TINY), ODD, {"rcu": 7, "rcu, fuse": 4, "conv3x3": 5}),
    "depth_pro": (
        lambda: depth_pro(TINY), [(128, 128), (160, 128), (128, 192)], {"rcu": 10, "rcu, fuse": 5, "conv3x3": 6},
    ),
    "smp DPT": (lambda: smp_dpt(TINY), BY_32, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 5}),
}  # fmt: skip


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    return depth_models.randomise(FAMILIES[family][0]()).eval()


def image(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # (1, 3, H, W)
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height), dtype=dtype)


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.predicted_depth


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradients of all parameters that take part in it."""
    y = result(model, x)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(y, list(model.parameters()), gy, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest relative error; of gradients that are nothing but rounding, as those of an attention's key bias,
    relative to a thousandth of the largest gradient."""
    assert len(got) == len(want)
    least = 1e-3 * max(w.norm().item() for w in want)
    return max((g - w).norm().item() / max(w.norm().item(), least) for g, w in zip(got, want))


@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients(family):
    model = built(family)
    fast = accelerate(model, copy=True)
    assert list(fast.state_dict()) == list(model.state_dict())
    counts: dict[str, int] = {}
    for row in explain(fast):
        assert row.op is not None and row.reason is None, row
        counts[row.op] = counts.get(row.op, 0) + 1
    assert counts == FAMILIES[family][2]
    for size in FAMILIES[family][1]:
        x = image(*size)
        want, got = step(model, x), step(fast, x)
        assert relative_l2(got[0], want[0]) <= 1e-4
        assert worst(got[1:], want[1:]) <= 1e-3


@pytest.fixture
def ran(monkeypatch) -> collections.Counter[str]:
    """How often each op has run in a block's place."""
    counts: collections.Counter[str] = collections.Counter()

    def counted(fused: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
        def call(self, *args, **kwargs):
            y = fused(self, *args, **kwargs)
            counts[self.op] += y is not None
            return y

        return call

    for kind in adapters.Adapter.__subclasses__():
        monkeypatch.setattr(kind, "fused", counted(kind.fused))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fusion_and_convolution_runs_on_the_ops(family, ran):
    """And the units inside the fusions, which do not call them."""
    model = accelerate(built(family))
    ran.clear()  # of the trials
    with torch.no_grad():
        result(model, image(*FAMILIES[family][1][0]))
    assert ran == {op: count for op, count in FAMILIES[family][2].items() if op != "rcu"}


def test_a_prompt_is_for_the_fusions_own_forward(ran):
    """It calls the units, 7 of the 8: the deepest fusion has no skip."""
    model = built("prompt_depth_anything")
    fast = accelerate(model, copy=True)
    ran.clear()
    x, prompt = image(*ODD[0]), torch.rand(1, 1, 20, 30, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (m(x, prompt_depth=prompt).predicted_depth for m in (model, fast))
        assert relative_l2(got, want) <= 1e-4 < relative_l2(model(x).predicted_depth, want)
    assert ran == {"rcu": 7, "conv3x3": 6}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float64_on_the_reference(family):
    model = built(family).double()
    x = image(*FAMILIES[family][1][0], dtype=torch.float64)
    with use_backend("reference"):
        want, got = step(model, x), step(accelerate(model, copy=True), x)
    assert relative_l2(got[0], want[0]) <= 1e-10 and worst(got[1:], want[1:]) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_same_bits(family):
    model = built(family)
    x = image(*FAMILIES[family][1][0])
    with torch.no_grad():
        before = result(model, x)
        assert torch.equal(result(restore(accelerate(copy.deepcopy(model))), x), before)


CUTS = {
    "depth_anything": "depth-anything",
    "prompt_depth_anything": "prompt-depth-anything",
    "chmv2": "chmv2",
    "tipsv2_dpt": "tipsv2-dpt",
    "depth_pro": "depth-pro",
}


@pytest.mark.parametrize("family", CUTS)
def test_a_decoder_of_a_network_computes_what_the_network_does(family):
    """The benchmark's cut: the decoder alone, from the maps of one run."""
    model = built(family)
    x = image(*FAMILIES[family][1][0])
    decoder = depth_models.Decoder(model, depth_models.FAMILIES[CUTS[family]].decoder, x)
    with torch.no_grad():
        want = result(model, x)
        assert torch.equal(decoder(*decoder.inputs).view_as(want), want)


def test_the_benchmark_builds_the_widths_that_a_family_comes_in(monkeypatch):
    """Widths of one name are not every family's."""
    seen: list[depth_models.Widths] = []

    def build(widths: depth_models.Widths) -> nn.Module:
        seen.append(widths)
        return depth_anything(TINY)

    smp = depth_models.FAMILIES["smp-dpt"]
    family = dataclasses.replace(smp, build=build, side=128, decoder=("neck", "head"))
    monkeypatch.setitem(depth_models.FAMILIES, "smp-dpt", family)
    case = bench_accelerate.case("smp-dpt", "B", False, False)
    harness.inputs_of(case, torch.float32, torch.device("cpu"))
    assert seen == [smp.widths["B"]] != [depth_models.BASE]


def test_the_benchmark_has_one_network_in_memory(monkeypatch):
    """Of two families one after the other, and of each the weights once: the modules that are timed have none."""
    alive: list[weakref.ref] = []

    def build(widths: depth_models.Widths) -> nn.Module:
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        model = depth_anything(widths)
        alive.extend(weakref.ref(p) for p in model.parameters())
        return model

    family = dataclasses.replace(depth_models.FAMILIES["depth-anything"], build=build)
    monkeypatch.setattr(depth_models, "FAMILIES", {"a": family, "b": family})
    for case in [bench_accelerate.case(name, "tiny", False, False) for name in "ab"]:
        inputs = harness.inputs_of(case, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            assert relative_l2(case.ours("cpu")(inputs.xs, inputs.ws), inputs.truth[0]) < 1e-5
        subject = bench_accelerate.Subject.held
        assert len(subject.built) >= 2 and len(subject.names) > 50
        for module in subject.built.values():
            assert {module.get_parameter(name).device.type for name in subject.names} == {"meta"}
        del inputs
    assert len(alive) > 100


def test_the_benchmark_compares_gradients_that_have_a_size():
    """That of an attention's key bias is zero but for rounding: relative to it, every error is enormous."""
    case = bench_accelerate.case("depth-anything", "tiny", True, True)
    inputs = harness.inputs_of(case, torch.float32, torch.device("cpu"))
    assert max(inputs.eager_errors) < 1e-2


def runs(family: str, width: str, trains: bool) -> list[Callable[[], object]]:
    """A step or a forward of a decoder as it is, and of the accelerated one; both have run once."""
    case = bench_accelerate.case(family, width, False, trains)
    generator = torch.Generator().manual_seed(0)
    xs, ws = case.setup(torch.float32, torch.device("cpu"), generator)
    contenders = case.eager, case.ours("cpu")
    if trains:
        xs, ws = [x.requires_grad_() for x in xs], [torch.nn.Parameter(w) for w in ws]
        gy = torch.ones_like(case.eager(xs, ws))
        calls = [functools.partial(harness.training_step, run, xs, ws, gy) for run in contenders]
    else:
        calls = [functools.partial(torch.no_grad()(run), xs, ws) for run in contenders]
    for run in calls:
        run()
    return calls


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("family", depth_models.FAMILIES)
def test_a_decoder_holds_no_more(family, trains):
    """All tensors of a run, in training those that are saved for backward among them."""
    peaks = []
    for run in runs(family, "tiny", trains):
        with LiveBytes() as live:
            run()
        peaks.append(live.peak)
    assert 0 < peaks[1] <= peaks[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc")
@pytest.mark.parametrize("width", ["S", "L"])
def test_a_decoder_needs_no_more_memory(width, tmp_path):
    """As the benchmark measures it, forward and in training: what kernels work in counts as well."""
    options = f"--families depth-anything --widths {width} --contenders eager,cpu --device cpu --threads 2 --seconds 1"
    rows = tmp_path / "rows.json"
    command = [sys.executable, bench_accelerate.__file__, *options.split(), "--json", rows]
    subprocess.run(command, check=True, timeout=1800)
    found = json.loads(rows.read_text())["rows"]
    peaks = {(row["direction"], row["contender"]): row["peak_memory_bytes"] for row in found}
    assert len(peaks) == 4
    for direction in harness.DIRECTIONS:
        assert 0 < peaks[direction, "cpu"] <= peaks[direction, "eager"]
