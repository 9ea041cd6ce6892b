"""benchmarks/roofline.py: floating-point operations, bytes and floors, against figures worked out by hand."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from refinenet_fast.backends import configurations

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
roofline = pytest.importorskip("roofline", reason="needs the checkout's benchmarks/")

from roofline import FORWARD, GPUS, SHAPES, TRAINING, Map, Work, floor, kernel_rows, path_rows  # noqa: E402

DTYPES = ("float32", "bfloat16", "float16")
LARGE = Map(8, 256, 128, 128)  # 33,554,432 elements, 64 MiB of a 16-bit format
MEBI = 2**20


def row_of(x: Map, name: str) -> roofline.Row:
    (found,) = [row for row in [*kernel_rows(x), *path_rows(x)] if row.name == name]
    return found


def all_rows() -> list[tuple[Map, roofline.Row]]:
    shapes = [*map(lambda shape: Map(*shape), SHAPES), Map(1, 1, 1, 1), Map(3, 17, 5, 9)]
    return [(x, row) for x in shapes for row in [*kernel_rows(x), *path_rows(x)]]


def run(*options: object) -> subprocess.CompletedProcess[str]:
    """The script in this process: another one spends seconds on importing PyTorch."""
    argv, out, err, code = ["roofline.py", *map(str, options)], io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ, COLUMNS="80"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = roofline.main()
        except SystemExit as left:
            code = left.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


# ---- operations and bytes --------------------------------------------------------------------------------------------


def test_operations_of_a_convolution():
    assert roofline.conv_flops(LARGE, 256, 9) == 154_618_822_656  # 154.6 GFLOP
    assert roofline.conv_flops(Map(1, 2, 3, 5), 7, 9) == 3 * 5 * 7 * (2 * 9) * 2
    assert roofline.conv_flops(Map(1, 2, 3, 5), 7, 1) == 3 * 5 * 7 * 2 * 2


@pytest.mark.parametrize(
    ("name", "maps_read", "maps_written", "rest"),
    [  # of 33,554,432 elements of two bytes each; the rest in bytes, and 9 * 256 * 256 weights beside it
        ("conv3x3", 1, 1, 0),
        ("conv3x3 + bias", 1, 1, 512),
        ("RCU conv 1: relu(x), bias, ReLU", 1, 1, 512),
        ("RCU conv 2: + x", 2, 1, 0),
        ("RCU conv 2: + x, relu(y) too", 2, 2, 0),
        ("RCU dgrad 2: select", 2, 1, 0),
        ("RCU dgrad 1: select, + gy", 3, 1, 0),
        ("CRP last conv: + t1, relu(x)", 3, 1, 0),
        ("fusion conv: + upsampled", 1, 1, 16 * MEBI),
        ("conv3x3_weight_grad", 2, 0, 0),
    ],
)
def test_bytes_of_convolutions(name, maps_read, maps_written, rest):
    (work,) = row_of(LARGE, name).kernels
    assert work.nbytes(2) == 64 * MEBI * (maps_read + maps_written) + 2 * 9 * 256 * 256 + rest
    assert work.flops == 154_618_822_656


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # MiB of a 16-bit format: a map has 64, a half-size one 16, an argmax 32
        ("maxpool5", 64 + 64),
        ("maxpool5, argmax", 64 + 64 + 32),
        ("maxpool5 backward", 64 + 32 + 64),
        ("maxpool5 backward + gradient", 64 + 32 + 64 + 64),
        ("bilinear", 16 + 64),
        ("bilinear + map", 16 + 64 + 64),
        ("bilinear backward", 64 + 16),
    ],
)
def test_bytes_of_what_multiplies_no_matrices(name, expected):
    (work,) = row_of(LARGE, name).kernels
    assert work.nbytes(2) == expected * MEBI
    assert work.flops == 0


def test_bytes_of_small_results():
    (work,) = row_of(LARGE, "bias_grad").kernels
    assert work.nbytes(2) == 64 * MEBI + 512
    (work,) = row_of(Map(1, 3, 5, 9), "bilinear").kernels
    assert work.nbytes(4) == 4 * 3 * (3 * 5 + 5 * 9)  # half of 5 x 9 is 3 x 5
    (work,) = row_of(Map(1, 3, 5, 9), "maxpool5, argmax").kernels
    assert work.nbytes(4) == 3 * 5 * 9 * (4 + 4 + 1)  # the argmax has one byte in every dtype


def test_one_kernel_for_a_light_stage_saves_the_pooled_map():
    (fused,) = row_of(LARGE, "CRP light: pool + 1x1 in one").kernels
    pool, conv = row_of(LARGE, "CRP light: pool, then 1x1").kernels
    assert fused.flops == conv.flops == 17_179_869_184
    assert fused.nbytes(2) == 2 * 64 * MEBI + 2 * 256 * 256
    assert pool.nbytes(2) + conv.nbytes(2) - fused.nbytes(2) == 2 * 64 * MEBI


# ---- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "dtype", "computing", "moving"),
    [  # 154,618,822,656 operations; 135,397,376 bytes of a 16-bit format
        ("A100", "bfloat16", 495.573, 66.404),
        ("A100", "float32", 991.146, 132.808),
        ("H100", "bfloat16", 156.275, 40.417),
        ("H100", "float32", 312.551, 80.834),
        ("H200", "float16", 156.275, 28.208),
        ("B200", "bfloat16", 68.7195, 16.9247),
        ("B200", "float32", 137.4390, 33.8493),
    ],
)
def test_times_of_a_convolution(gpu, dtype, computing, moving):
    (work,) = row_of(LARGE, "conv3x3").kernels
    assert roofline.times(work, GPUS[gpu], dtype) == pytest.approx((computing, moving), rel=1e-5)
    assert floor([work], GPUS[gpu], dtype) == (pytest.approx(computing, rel=1e-5), 1)


def test_the_floor_is_the_larger_time_and_says_which():
    gpu = replace(GPUS["H100"], half=1, tf32=1, bandwidth=1)  # a million operations or bytes in a microsecond
    assert floor([Work(3_000_000, 1_000_000)], gpu, "bfloat16") == (3, 1)
    assert floor([Work(3_000_000, 1_000_000)], gpu, "float32") == (4, 0)
    assert floor([Work(3_000_000, 1_000_000, argmax=2_000_000)], gpu, "bfloat16") == (4, 0)


def test_kernels_of_a_sum_do_not_overlap():
    gpu = replace(GPUS["H100"], half=1, bandwidth=1)
    assert floor([Work(3_000_000, 0), Work(0, 500_000)], gpu, "float16") == (4, 0.75)


def test_every_row_is_finite_and_positive_on_every_gpu():
    assert {*GPUS} == {"A100", "H100", "H200", "B200"}
    for x, row in all_rows():
        for name, gpu in GPUS.items():
            for dtype in DTYPES:
                us, computing = floor(row.kernels, gpu, dtype)
                assert math.isfinite(us) and us > 0, (name, x, row.name)
                assert 0 <= computing <= 1, (name, x, row.name)


def test_more_work_is_never_faster():
    for larger in (Map(9, 256, 128, 128), Map(8, 264, 128, 128), Map(8, 256, 129, 128), Map(8, 256, 128, 130)):
        for small, large in zip([*kernel_rows(LARGE), *path_rows(LARGE)], [*kernel_rows(larger), *path_rows(larger)]):
            for gpu in GPUS.values():
                assert floor(small.kernels, gpu, "bfloat16")[0] < floor(large.kernels, gpu, "bfloat16")[0], small.name


def test_newer_gpus_are_never_slower_and_wider_elements_never_faster():
    for x, row in all_rows():
        us = [[floor(row.kernels, gpu, dtype)[0] for gpu in GPUS.values()] for dtype in ("bfloat16", "float32")]
        for of_dtype in us:
            assert of_dtype == sorted(of_dtype, reverse=True), (x, row.name)
        assert all(narrow < wide for narrow, wide in zip(*us)), (x, row.name)


@pytest.mark.parametrize(
    ("gpu", "processors", "operations", "gigahertz"),
    [  # dense operations of a 16-bit format that a multiprocessor does in a clock; the clock of the datasheet's peak
        ("A100", configurations.A100.processors, 2048, 1.410),
        ("H100", configurations.H100.processors, 4096, 1.830),
        ("H200", configurations.H100.processors, 4096, 1.830),
        ("B200", configurations.B200.processors, 8192, 1.850),
    ],
)
def test_peaks_are_dense(gpu, processors, operations, gigahertz):
    """A peak with sparsity would be twice what the multiprocessors can do."""
    assert GPUS[gpu].half == pytest.approx(processors * operations * gigahertz / 1e3, rel=5e-3)
    assert GPUS[gpu].tf32 == pytest.approx(GPUS[gpu].half / 2)


# ---- hot paths -------------------------------------------------------------------------------------------------------


def crp_case(shape: tuple[int, int, int, int], stages: int, kernel: int):
    import bench_crp

    n, *size = shape
    chosen = argparse.Namespace(order="pool-conv", stages=stages, kernel=kernel, batch=[n], shapes=[size])
    (case,) = bench_crp.cases(chosen)
    return case


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_work_of_the_paths_is_what_their_benchmarks_count(shape):
    """Operations of the convolutions: a benchmark's own figure, from which its GFLOP/s follow."""
    import bench_conv3x3
    import bench_fusion
    import bench_rcu

    cases = {
        "conv3x3": bench_conv3x3.case(*shape),
        "rcu": bench_rcu.case(*shape),
        "crp2": crp_case(shape, stages=2, kernel=3),
        "crp4": crp_case(shape, stages=4, kernel=3),
        "fusion": bench_fusion.case(*shape),
    }
    compared = 0
    for row in [*kernel_rows(Map(*shape)), *path_rows(Map(*shape))]:
        what, direction = row.measured or ("", "")
        if what in cases:
            assert sum(work.flops for work in row.kernels) == cases[what].work[direction], row.name
            compared += 1
    assert compared == 2 * len(cases)


def test_bytes_of_the_kernels_paths_are_those_of_their_benchmarks_and_the_argmax():
    import bench_bilinear
    import bench_maxpool5

    shape, size = (8, 256, 64, 64), 8 * 256 * 64 * 64
    for what, case, argmax in (
        ("maxpool5", bench_maxpool5.case(*shape, "bfloat16"), 2 * size),  # written, then read
        ("bilinear", bench_bilinear.case(*shape, "bfloat16"), 0),
    ):
        rows = {row.measured: row for row in [*kernel_rows(Map(*shape)), *path_rows(Map(*shape))]}
        moved = [sum(work.nbytes(2) for work in rows[what, way].kernels) for way in (FORWARD, TRAINING)]
        assert moved == [case.work[FORWARD], case.work[TRAINING] + argmax]


def test_the_fusion_that_reads_the_deepest_block():
    low, high = roofline.fusion_forward(Map(8, 256, 32, 32))
    assert low.flops == 2 * 8 * 16 * 16 * 512 * 256 * 9
    maps = 8 * 512 * 16 * 16 + 8 * 256 * 16 * 16
    assert low.elements == maps + 9 * 512 * 256
    assert high.flops == 2 * 8 * 32 * 32 * 256 * 256 * 9
    *_, transposed, gradient = roofline.fusion_backward(Map(8, 256, 32, 32))
    assert transposed == low  # reads K channels and writes C
    assert gradient == low


def test_sums_of_the_hot_paths_on_one_gpu():
    """H100, bfloat16, 8x256x128x128, in microseconds: 156.275 a convolution, 20.032 a map that is read or written."""
    conv, a_map = 156.2754, 20.03249
    expected = {
        "RCU, forward": 2 * conv,
        "RCU, fwd+bwd": 6 * conv + a_map,  # one bias gradient
        "CRP stage: pool, then conv3x3": conv + 2 * a_map,
        "CRP, 2 stages, forward": 2 * (conv + 2 * a_map),
        "CRP, 2 stages, fwd+bwd": 2 * (3 * conv + (2 + 2.5 + 3.5) * a_map) + 3 * a_map,
        "CRP, 4 stages, forward": 4 * (conv + 2 * a_map),
        "CRP, 4 stages, fwd+bwd": 4 * (3 * conv + 8 * a_map) + 3 * a_map,
        # Memory bounds 1x1 convolutions: their 128 KiB of weights take 0.0391, and the last one adds as many maps as
        # there are stages.
        "CRP light, 2 stages, forward": 6 * a_map + 2 * 0.0391,
        "CRP light, 2 stages, fwd+bwd": 2 * (2.5 + 3 * 2 + 3.5) * a_map + (2 + 3) * a_map + 6 * 0.0391,
        "fusion, 2 paths, forward": 1.25 * conv,
        "fusion, 2 paths, fwd+bwd": 3 * 1.25 * conv + 1.25 * a_map,
    }
    for name, us in expected.items():
        assert floor(row_of(LARGE, name).kernels, GPUS["H100"], "bfloat16")[0] == pytest.approx(us, rel=1e-4), name


def test_a_crp_adds_what_came_before_in_its_last_convolution():
    elements = [work.elements for work in roofline.crp_forward(LARGE, 4)[1::2]]
    assert [(e - elements[0]) / LARGE.elements for e in elements] == [0, 0, 0, 4]  # t1, t2, t3, x


# ---- measurements ----------------------------------------------------------------------------------------------------


def measurement(benchmark: str, us: float, **fields: object) -> dict[str, object]:
    """A row as the benchmarks write it."""
    row = {
        "benchmark": f"bench_{benchmark}",
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "command": f"python benchmarks/bench_{benchmark}.py --device cuda",
        "date": "2026-01-02T03:04:05+00:00",
        "shape": "8x256x128x128",
        "dtype": "bfloat16",
        "direction": FORWARD,
        "contender": "triton",
        "problem": None,
        "median_ms": us / 1e3,
    }
    return row | fields


def table(folder: Path, *options: object) -> dict[tuple[str, str], dict]:
    """(shape, name) -> row of the JSON file, of the H100."""
    out = folder / "out" / "table.json"
    out.parent.mkdir(exist_ok=True)
    done = run("--results", folder, "--json", out, "--gpu", "H100", *options)
    assert done.returncode == 0, done.stderr
    return {(row["shape"], row["name"]): row for row in json.loads(out.read_text())["rows"]}


def test_a_benchmarks_file_fills_the_measured_column(tmp_path):
    rows = [
        measurement("conv3x3", 312.5507),
        measurement("conv3x3", 400, contender="cuda"),
        measurement("conv3x3", 1, contender="eager"),  # none of ours
        measurement("conv3x3", 2, contender="cuda", median_ms=None, problem="wrong"),
        measurement("conv3x3", 3, device_name="NVIDIA H100 PCIe"),
        measurement("conv3x3", 4, dtype="float16"),
        measurement("maxpool5", 80, direction=TRAINING),
    ]
    (tmp_path / "h100.json").write_text(json.dumps({"rows": rows}))
    found = table(tmp_path)
    row = found["8x256x128x128", "conv3x3 + bias"]
    assert row["measured_us"] == pytest.approx(312.5507)
    assert row["contender"] == "triton"
    assert row["at_floor"] == pytest.approx(0.5, rel=1e-4)
    assert found["8x256x128x128", "maxpool5, fwd+bwd"]["measured_us"] == pytest.approx(80)
    assert sum(row["measured_us"] is not None for row in found.values()) == 2
    shown = run("--results", tmp_path, "--gpu", "H100,H200", "--batch", 8, "--size", 128, "--channels", 256).stdout
    lines = [line.split() for line in shown.splitlines() if line.startswith("conv3x3 + bias  ")]
    assert [line[3:] for line in lines] == [
        ["154.6", "135.4", "156.3", "compute", "triton", "312.6", "50%"],
        ["154.6", "135.4", "156.3", "compute", "–", "–"],
    ]


def test_a_file_of_all_sections_fills_it_too(tmp_path):
    meta = {"device_name": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00"}
    bare = {"case": "8x256->256 at 128x128", "dtype": "bf16", "median_ms": 0.25, "flops": 1}
    ceilings = [
        bare | {"direction": FORWARD},
        bare | {"direction": "weight gradient", "median_ms": 0.5},
        bare | {"direction": FORWARD, "case": "8x256->512 at 128x128", "median_ms": 0.9},  # another convolution
        bare | {"direction": FORWARD, "case": "8x256->256 at 64x64", "error": "out of memory", "median_ms": None},
    ]
    crp = [
        measurement("crp", 600, contender="cuda"),
        measurement("crp", 1200, command="python benchmarks/bench_crp.py --stages 4"),
        measurement("crp", 700, command="python benchmarks/bench_crp.py --order conv-pool"),
        measurement("crp", 300, command="python benchmarks/bench_crp.py --kernel 1 --stages 4"),
    ]
    sections = {
        "correctness": {"error": None, "meta": meta, "rows": [{"backend": "triton", "shape": [1, 2], "ok": True}]},
        "ceilings": {"error": None, "meta": meta, "sections": {"conv": {"rows": ceilings}, "copy": {"rows": []}}},
        "crp": {"error": "stopped after 900 s", "rows": crp},
        "rcu": {"error": "exit code 1"},
    }
    (tmp_path / "h100.json").write_text(json.dumps({"meta": meta, "sections": sections}))
    found = {key: row for key, row in table(tmp_path).items() if row["measured_us"] is not None}
    assert {key: (row["contender"], round(row["measured_us"], 6)) for key, row in found.items()} == {
        ("8x256x128x128", "conv3x3"): ("vendor", 250),
        ("8x256x128x128", "conv3x3_weight_grad"): ("vendor", 500),
        ("8x256x128x128", "CRP, 2 stages, forward"): ("cuda", 600),
        ("8x256x128x128", "CRP, 4 stages, forward"): ("triton", 1200),
        ("8x256x128x128", "CRP light, 4 stages, forward"): ("triton", 300),
    }


def test_of_two_measurements_the_newer_counts(tmp_path):
    newer = measurement("rcu", 500, date="2026-03-01T00:00:00+00:00")
    (tmp_path / "a.json").write_text(json.dumps({"rows": [newer]}))
    (tmp_path / "b.json").write_text(json.dumps({"rows": [measurement("rcu", 400)]}))
    assert table(tmp_path)["8x256x128x128", "RCU, forward"]["measured_us"] == pytest.approx(500)


def test_the_committed_results_can_be_read():
    """Their shape, dtype and direction are found again, of whatever device they are."""
    measured = roofline.read_results(BENCHMARKS / "results")
    assert {label[1] for label in measured} >= {"conv3x3", "rcu", "crp2", "fusion", "maxpool5", "bilinear"}
    labels = {label[1:5] for label in measured}
    assert ("conv3x3", FORWARD, "1x256x64x64", "float32") in labels
    assert ("crp2", TRAINING, "1x256x32x32", "float32") in labels


# ---- command line ----------------------------------------------------------------------------------------------------


def test_it_prints_every_gpu_and_shape(tmp_path):
    """In a process of its own. No measurement lies there, so none is shown."""
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), "--results", str(tmp_path)]
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr
    for name in GPUS:
        for shape in ("8x256x128x128", "8x256x64x64", "8x256x32x32", "8x512x16x16", "1x256x64x64", "1x256x32x32"):
            assert f"{name} SXM, {shape}, bfloat16: " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("CRP, 4 stages, forward")]
    assert len(lines) == len(GPUS) * 6
    assert all(line.split()[-2:] == ["–", "–"] for line in lines)


def test_options_choose_shapes_and_dtype(tmp_path):
    found = table(tmp_path, "--batch", "2,3", "--channels", "64", "--size", "40,30x50", "--dtype", "float32")
    assert {shape for shape, _ in found} == {f"{n}x64x{size}" for n in (2, 3) for size in ("40x40", "30x50")}
    row = found["3x64x30x50", "conv3x3"]
    assert (row["dtype"], row["flops"]) == ("float32", 2 * 3 * 30 * 50 * 64 * 64 * 9)
    assert row["bytes"] == 4 * (2 * 3 * 64 * 30 * 50 + 9 * 64 * 64)
    found = table(tmp_path, "--batch", "2")
    assert {shape for shape, _ in found} == {"2x256x128x128", "2x256x64x64", "2x256x32x32", "2x512x16x16"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "V100"], "V100"),
        (["--size", "12x"], "12x"),
        (["--batch", "0"], "above 0"),
        (["--results", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_named(options, says):
    done = run(*options)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "cut_off.json").write_text('{"rows": [')
    done = run("--results", tmp_path)
    assert done.returncode == 2
    assert "cut_off.json" in done.stderr and "Traceback" not in done.stderr
