"""Tables: which row answers, what is done with a broken one; and tune(), which writes them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

import refinenet_fast
from emulator.backend import Emulated
from emulator.triton_backend import EmulatedTriton
from executors import needs_nvcc
from refinenet_fast import RefineNetBlock, _native, backends
from refinenet_fast.backends import engine, table
from refinenet_fast.backends.configurations import H100, Configuration, Problem, choose
from refinenet_fast.backends.cuda import TILES
from refinenet_fast.backends.table import Question
from refinenet_fast.testing import exact_float32

SHAPE = (1, 16, 16, 32, 32, 9)
needs_core = pytest.mark.skipif(_native._C is None, reason=str(_native.missing))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder for the user's tables, and no committed ones."""
    monkeypatch.setenv("REFINENET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(table, "COMMITTED", tmp_path / "committed")
    table.reload()
    yield tmp_path
    table.reload()


def row(shape, choice, kernel="triton conv3x3", dtype="bfloat16"):
    return {"kernel": kernel, "dtype": dtype, "shape": list(shape), "choice": choice}


def ask(*shape, kernel="triton conv3x3", dtype="bfloat16"):
    return table.lookup(Question("sm_90", kernel, dtype, shape))


def test_the_nearest_row_answers_and_a_far_one_does_not(folder):
    rows = [row((8, 64, 64, 256, 256, 9), "vendor"), row((8, 16, 16, 512, 512, 9), {"a": 1})]
    table.write("sm_90", rows, {})
    assert ask(8, 60, 60, 256, 256, 9) == "vendor"
    assert ask(8, 17, 17, 512, 512, 9) == {"a": 1}
    assert ask(8, 64, 64, 256, 256, 1) is None
    assert ask(8, 64, 64, 16, 16, 9) is None
    assert ask(8, 64, 64, 256, 256, 9, dtype="float16") is None
    assert ask(8, 64, 64, 256, 256, 9, kernel="triton weight_grad") is None


def test_the_users_rows_come_before_the_committed_ones(folder):
    table.write("sm_90", [row(SHAPE, "committed"), row((1, 64, 64, 256, 256, 9), "other")], {}, table.COMMITTED)
    assert ask(*SHAPE) == "committed"
    table.write("sm_90", [row(SHAPE, "mine")], {})
    assert ask(*SHAPE) == "mine" and ask(1, 64, 64, 256, 256, 9) == "other"


def test_a_row_is_replaced_and_others_are_kept(folder):
    other = (4, 9, 9, 16, 16, 9)
    table.write("sm_90", [row(SHAPE, "old"), row(other, "kept")], {})
    path = table.write("sm_90", [row(SHAPE, "new")], {"by": "a test"})
    content = json.loads(path.read_text())
    assert [r["choice"] for r in content["rows"]] == ["new", "kept"] and content["made"] == {"by": "a test"}
    assert list(folder.iterdir()) == [path]


def test_a_table_of_another_family_is_named_and_left_out(folder):
    table.write("sm_80", [row(SHAPE, "vendor")], {}).rename(folder / "sm_90.json")
    with pytest.warns(UserWarning, match=r"sm_90.json is not read: expected the table of sm_90, got that of 'sm_80'"):
        assert ask(*SHAPE) is None


@pytest.mark.parametrize(
    "text", ["", "[" * 200_000, "[]", "{}", '{"rows": [{"kernel": "x"}]}', '{"rows": [1]}', "\x00"]
)
def test_a_broken_table_is_named_and_left_out(folder, text):
    (folder / "sm_90.json").write_text(text)
    with pytest.warns(UserWarning, match=r"sm_90.json is not read: .*refinenet_fast.tune"):
        assert ask(*SHAPE) is None


def test_a_tables_configuration_is_used_where_it_can_be(folder):
    found, problem = Configuration(True, 1, 64, 128, 64, warps=4, stages=3), Problem(2, 64, 64, 256, 256, 9, 2)
    x, kernels = torch.empty(2, 256, 64, 64, dtype=torch.bfloat16), EmulatedTriton(90)
    usual = choose("conv3x3", H100, problem)
    assert kernels._configuration("conv3x3", x, 256, 9) == usual != found
    table.write("sm_90", [row(problem.shape, asdict(found))], {})
    assert kernels._configuration("conv3x3", x, 256, 9) == found
    assert not kernels._configuration("conv3x3", x[:, :250], 256, 9).described  # 500-byte rows have no tensor map
    for wrong in ({**asdict(found), "stages": 40}, {"tile": 3}, {}):
        table.write("sm_90", [row(problem.shape, wrong)], {})
        assert kernels._configuration("conv3x3", x, 256, 9) == usual


def test_the_vendors_convolution_is_a_choice(folder):
    table.write("sm_90", [row((1, 5, 6, 16, 8, 9), "vendor")], {})
    x, weight = torch.randn(1, 16, 5, 6, dtype=torch.bfloat16), torch.randn(8, 16, 3, 3)
    kernels = EmulatedTriton(90)
    assert kernels.fuses(x, weight, pack=False) == backends.base.BIAS_ONLY
    kernels._run = None  # would fail
    y = kernels.conv3x3(x, weight, backends.WayIn(), backends.WayOut(relu=True))
    assert torch.equal(y, torch.conv2d(x, weight.bfloat16(), padding=1).relu())


@pytest.mark.parametrize("path", sorted(table.COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_table_is_one_that_tune_could_have_made(path, recwarn):
    """And in every row what is chosen is, among what was measured, the fastest or the vendor's close behind it."""
    rows = table.read(path)
    assert rows and not recwarn.list and json.loads(path.read_text())["made"]["cpu"]
    for r in rows:
        choice, ms = r["choice"], r["ms"]
        assert choice in ms and ms[choice] <= (1.05 if choice == "vendor" else 1) * min(ms.values()), r
    questions = [(r["kernel"], r["dtype"], *r["shape"]) for r in rows]
    assert len(set(questions)) == len(questions)


@needs_core
def test_tune_measures_every_convolution_of_a_model_once(folder):
    block = RefineNetBlock([32], 32, crp_stages=2).eval()
    lines = []
    path = refinenet_fast.tune(block, [torch.randn(1, 32, 16, 16)], progress=lines.append)
    isa = _native._C.cpu_isa()
    assert path == folder / f"{isa}.json"
    content = json.loads(path.read_text())
    (only,) = content["rows"]
    assert only["kernel"] == "cpu conv3x3" and only["shape"] == list(SHAPE) and len(lines) == 1
    assert set(only["ms"]) == {"vendor", "winograd"} and only["choice"] == min(only["ms"], key=only["ms"].get)
    assert content["made"]["torch"] == torch.__version__


@needs_core
def test_tune_in_training_leaves_the_model_as_it_was(folder):
    block = torch.nn.Sequential(torch.nn.BatchNorm2d(32), refinenet_fast.ResidualConvUnit(32), torch.nn.Dropout())
    before = {name: t.clone() for name, t in block.state_dict().items()}
    example, state = torch.randn(1, 32, 16, 16), torch.get_rng_state()
    refinenet_fast.tune(block, example)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters()) and block.training
    kernels = {r["kernel"] for r in json.loads(next(folder.iterdir()).read_text())["rows"]}
    assert kernels == {"cpu conv3x3", "cpu weight_grad"}
    assert torch.equal(torch.get_rng_state(), state)


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [3, 1])
@pytest.mark.parametrize("rotated", [True, False])
def test_the_cpu_backend_does_as_its_table_says(folder, dtype, side, rotated):
    """Rows of 32 to 80 channels; those of 80 to 32, which the input gradient convolves, say the opposite."""
    family, kind, own = _native._C.cpu_isa(), str(dtype).removeprefix("torch."), engine.NAMES[side**2]
    x = torch.empty(1, 80 if rotated else 32, 16, 16, dtype=dtype)  # where rotated, the result's gradient
    weight = torch.empty(80, 32, side, side)
    for choice, other in (("vendor", own), (own, "vendor")):
        here, there = ((1, 16, 16, c, k, side**2) for c, k in ((80, 32), (32, 80))[:: 1 if rotated else -1])
        rows = [row(here, choice, "cpu conv3x3", kind), row(there, other, "cpu conv3x3", kind)]
        table.write(family, rows, {})
        assert engine.pays(x, weight, rotated) == (choice == own)
        if not rotated:
            fuses = engine.FUSES if choice == own else backends.cpu.ONEDNN_FUSES
            assert backends.get("cpu").fuses(x, weight, pack=True) == fuses
        if not rotated and side == 3:
            table.write(family, [row(here, other, "cpu weight_grad", kind)], {})
            assert engine.gradient_pays(x, weight) == (other == own)


def test_thin_maps_do_not_take_a_squares_answer(folder):
    table.write("sm_90", [row((1, 16, 16, 64, 64, 9), "square")], {})
    assert ask(1, 16, 16, 64, 64, 9) == ask(1, 13, 16, 64, 64, 9) == "square"
    assert ask(1, 2, 128, 64, 64, 9) is ask(256, 1, 1, 64, 64, 9) is ask(64, 2, 2, 64, 64, 9) is None
    assert ask(4, 8, 8, 64, 64, 9) == "square"


@needs_nvcc
@pytest.mark.parametrize("kernel", ["conv3x3", "pool_conv3x3", "weight_grad"])
@pytest.mark.parametrize("dtype, c", [("bfloat16", 16), ("bfloat16", 12), ("float32", 8)])
def test_what_the_cuda_backend_offers_runs(kernel, dtype, c):
    """Tiles only that the kernels do not replace by others."""
    with exact_float32():
        trials = Emulated().trials(kernel, dtype, (1, 3, 5, c, 8, 9), torch.device("cpu"))
        for _, run in trials:
            run()
    large = c == 16 or (c, kernel) == (8, "conv3x3")
    more = {"splits": 1} if kernel == "conv3x3" else {}
    wanted = [{"tile": tile, **more} for tile in TILES[kernel][0 if large else 1 :]]
    assert [choice for choice, _ in trials[1:]] == wanted


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_where_tiles_are_few_the_cuda_backend_offers_splits(arch):
    """Those of which each multiprocessor has two blocks at most; on Hopper of its own loop's tiles."""
    kernels, shape = Emulated(arch, processors=4), (1, 3, 5, 136, 72, 9)
    trials = kernels.trials("conv3x3", "bfloat16", shape, torch.device("cpu"))
    for _, run in trials:
        run()
    widest = [(256, 1), (256, 2)] if arch == "sm_90a" else []
    pairs = [*widest, (128, 1), (128, 2), (64, 1), (64, 2)]
    assert [choice for choice, _ in trials[1:]] == [{"tile": tile, "splits": splits} for tile, splits in pairs]
    many = kernels.trials("conv3x3", "bfloat16", (8, 64, 64, 136, 72, 9), torch.device("cpu"))
    assert all(choice["splits"] == 1 for choice, _ in many[1:])


@needs_core
@needs_nvcc
def test_the_cuda_backend_does_as_its_table_says(folder):
    kernels, x, weight = Emulated(), torch.randn(1, 16, 5, 6, dtype=torch.bfloat16), torch.randn(8, 16, 3, 3)
    pool = backends.WayIn(relu=True, pool=True)
    assert kernels._tiling("conv3x3", x, weight) == (0, 0) and not kernels._is_vendors("conv3x3", x, weight)
    assert kernels._pooled(x, weight, pool) == (x, pool)
    for kernel, choice in (("conv3x3", {"tile": 64}), ("pool_conv3x3", "apart"), ("weight_grad", "vendor")):
        table.write("sm_80", [row((1, 5, 6, 16, 8, 9), choice, f"cuda {kernel}")], {})
    assert kernels._tiling("conv3x3", x, weight) == (64, 0) and kernels._is_vendors("weight_grad", x, weight)
    pooled, way_in = kernels._pooled(x, weight, pool)
    assert torch.equal(pooled, kernels.maxpool5(x, relu=True)[0]) and way_in == backends.WayIn()
    table.write("sm_80", [row((1, 5, 6, 16, 8, 9), {"tile": 128, "splits": 2}, "cuda conv3x3")], {})
    assert kernels._tiling("conv3x3", x, weight) == (128, 2)
    for wrong in ({"tile": 3}, {}, "other", {"tile": 64, "splits": -1}, {"tile": 64, "splits": "two"}):
        table.write("sm_80", [row((1, 5, 6, 16, 8, 9), wrong, "cuda conv3x3")], {})
        assert kernels._tiling("conv3x3", x, weight) == (0, 0)
    table.write("sm_80", [row((1, 5, 6, 16, 8, 9), "vendor", "cuda conv3x3")], {})
    assert kernels.fuses(x, weight, pack=False) == backends.base.BIAS_ONLY
    kernels._call = None  # would fail
    y = kernels.conv3x3(x.zero_(), weight.zero_(), way_out=backends.WayOut(relu=True))
    assert torch.equal(y, torch.zeros(1, 8, 5, 6, dtype=torch.bfloat16))


@needs_core
def test_a_candidate_that_does_not_run_is_left_out(folder, monkeypatch):
    kernels = backends.get("cpu")

    def trials(kernel, dtype, shape, device):
        def fails():
            raise RuntimeError("too many registers")

        return [("vendor", lambda: None), ("broken", fails), ("winograd", lambda: None)]

    monkeypatch.setattr(kernels, "trials", trials)
    with pytest.warns(UserWarning, match="a candidate is left out: too many registers"):
        path = refinenet_fast.tune(refinenet_fast.ResidualConvUnit(32).eval(), torch.randn(1, 32, 16, 16))
    assert set(json.loads(path.read_text())["rows"][0]["ms"]) == {"vendor", "winograd"}


def test_an_example_without_a_tensor_is_refused(folder):
    with pytest.raises(TypeError, match=r"example: expected a tensor, .* got str"):
        refinenet_fast.tune(refinenet_fast.ResidualConvUnit(4), "x")


def test_no_home_no_tables(monkeypatch):
    monkeypatch.delenv("REFINENET_FAST_TABLES")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(table.Path, "home", no_home)
    table.reload()
    assert table.user_folder() is None and ask(*SHAPE) is None
    with pytest.raises(OSError, match="set REFINENET_FAST_TABLES"):
        table.write("sm_90", [], {})
    table.reload()


def test_tune_on_the_reference_finds_nothing(folder):
    with refinenet_fast.use_backend("reference"):
        assert refinenet_fast.tune(refinenet_fast.ResidualConvUnit(4), torch.randn(1, 4, 5, 5)) is None
    assert list(folder.iterdir()) == []
