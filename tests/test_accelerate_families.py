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
    dpt_hybrid,
    prompt_depth_anything,
    smp_dpt,
    tipsv2_dpt,
    zoedepth,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = [(70, 98), (42, 126), (98, 42)]  # pixels; by patches of 14: 5x7, 3x9 and 7x3
BY_16 = [(48, 80), (80, 48), (112, 16)]
BY_32 = [(64, 96), (96, 32), (160, 32)]
BY_32_WIDE = [(128, 128), (160, 128), (128, 192)]
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
    "dpt, hybrid": (lambda: dpt_hybrid(TINY, 48), [(48, 48)], {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "dpt, segmentation": (lambda: dpt(TINY, segments=True), SQUARES, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "zoedepth": (lambda: zoedepth(TINY), BY_16, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6}),
    "zoedepth, batch norm": (
        lambda: zoedepth(TINY, use_batch_norm_in_fusion_residual=True),
        BY_16,
        {"rcu": 8, "rcu, fuse": 4, "conv3x3": 6},
    ),
    "chmv2": (lambda: chmv2(TINY), BY_16, {"rcu": 7, "rcu, fuse": 4, "conv3x3": 6}),
    "tipsv2_dpt": (lambda: tipsv2_dpt(TINY), ODD, {"rcu": 7, "rcu, fuse": 4, "conv3x3": 5}),
    "depth_pro": (lambda: depth_pro(TINY), BY_32_WIDE, {"rcu": 10, "rcu, fuse": 5, "conv3x3": 6}),
    "depth_pro, batch norm": (
        lambda: depth_pro(TINY, use_batch_norm_in_fusion_residual=True),
        BY_32_WIDE,
        {"rcu": 10, "rcu, fuse": 5, "conv3x3": 6},
    ),
    "depth_pro, field of view": (
        lambda: depth_pro(TINY, use_fov_model=True), BY_32_WIDE, {"rcu": 10, "rcu, fuse": 5, "conv3x3": 6},
    ),
    "smp DPT": (lambda: smp_dpt(TINY), BY_32, {"rcu": 8, "rcu, fuse": 4, "conv3x3": 5}),
}  # fmt: skip


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    return depth_models.randomise(FAMILIES[family][0]()).eval()


def image(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # (1, 3, H, W)
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height), dtype=dtype)


def result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The map; of Depth Pro with a field of view, that as well, in one vector."""
    y = model(x)
    if isinstance(y, torch.Tensor):
        return y
    if y.get("field_of_view") is not None:
        return torch.cat([y.predicted_depth.flatten(), y.field_of_view])
    return y.logits if "logits" in y else y.predicted_depth


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradients of all parameters that take part in it, but an attention's key biases: softmax takes
    these away again, and their gradients are nothing but rounding."""
    parameters = [p for name, p in model.named_parameters() if not name.endswith(("key.bias", "k_proj.bias"))]
    y = result(model, x)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(y, parameters, gy, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def worst(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest relative error."""
    assert len(got) == len(want) > 50
    return max(map(relative_l2, got, want))


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    states = got.state_dict(), want.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients(family):
    model = built(family)
    fast = accelerate(model, copy=True)
    assert_same_state(fast, model)
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


@pytest.mark.parametrize("size", [None, (9, 13)])
@pytest.mark.parametrize("skip", [(7, 9), (3, 11), (5, 6)])
def test_a_skip_of_another_size_is_resized_as_the_layer_does(skip, size, ran):
    layer = built("depth_anything").neck.fusion_stage.layers[1]
    fast = accelerate(layer, copy=True)
    ran.clear()
    outcomes = []
    for module in (layer, fast):
        xs = [torch.randn(2, 12, *s, generator=torch.Generator().manual_seed(s[0])) for s in ((5, 6), skip)]
        inputs = [*(x.requires_grad_() for x in xs), *module.parameters()]
        y = module(*xs, size=size)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        outcomes.append([y.detach(), *torch.autograd.grad(y, inputs, gy)])
    assert ran == {"rcu, fuse": 1}
    assert max(map(relative_l2, outcomes[1], outcomes[0])) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_float64_on_the_reference(family):
    model = built(family).double()
    fast = accelerate(model, copy=True)
    for size in FAMILIES[family][1]:
        x = image(*size, dtype=torch.float64)
        with use_backend("reference"):
            want, got = step(model, x), step(fast, x)
        assert relative_l2(got[0], want[0]) <= 1e-10 and worst(got[1:], want[1:]) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_same_bits(family):
    model = built(family)
    x = image(*FAMILIES[family][1][0])
    other = accelerate(model, copy=True)
    parameters = list(other.parameters())
    assert restore(other) is other
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert all(p is q for p, q in zip(other.parameters(), parameters, strict=True))
    assert_same_state(other, model)
    want, got = step(model, x), step(other, x)
    assert len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("family", ["depth_anything", "dpt, batch norm", "depth_pro"])
def test_weights_are_loaded_and_used(family, assign):
    fast, x = accelerate(built(family)), image(*FAMILIES[family][1][0])
    other = depth_models.randomise(FAMILIES[family][0](), seed=1).eval()
    with torch.no_grad():
        before, want = result(fast, x), result(other, x)
        fast.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert relative_l2(result(fast, x), want) <= 1e-4 < relative_l2(before, want)
    assert_same_state(fast, other)


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
def test_a_decoder_needs_no_more_memory(tmp_path):
    """As the benchmark measures it: what kernels work in counts as well, and in forward, where the tensors alone are as
    many, comes on top of S's: 1 MB of 99. L's peak is not at a convolution."""
    options = "--families depth-anything --widths S --contenders eager,cpu --device cpu --threads 2 --seconds 1"
    rows = tmp_path / "rows.json"
    command = [sys.executable, bench_accelerate.__file__, *options.split(), "--json", rows]
    subprocess.run(command, check=True, timeout=1800)
    found = json.loads(rows.read_text())["rows"]
    peaks = {(row["direction"], row["contender"]): row["peak_memory_bytes"] for row in found}
    assert len(peaks) == 4
    for direction, limit in ((harness.FORWARD, 1.025), (harness.TRAINING, 1.0)):
        assert 0 < peaks[direction, "cpu"] <= limit * peaks[direction, "eager"]
