"""benchmarks/peers.py: other libraries as contenders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
peers = pytest.importorskip("peers", reason="needs the checkout's benchmarks/")

import bench_fusion  # noqa: E402
import cli  # noqa: E402
import harness  # noqa: E402

CPU = torch.device("cpu")


def installed(name: str) -> None:
    for package in peers.PACKAGES[name]:
        pytest.importorskip(package)


def chosen(name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> tuple[list, list[str]]:
    said: list[str] = []
    return peers.choose([name], device, dtype, said.append), said


def prepared(name: str, direction: str, case: harness.Case) -> harness.Entry:
    (contender,), _ = chosen(name)
    return harness.prepare(case, harness.inputs_of(case, torch.float32, CPU), direction, contender)


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_forward(name: str) -> None:
    """Two inputs, a resize and odd sizes: the export means the same, and the memory it reads stays alive."""
    installed(name)
    entry = prepared(name, harness.FORWARD, bench_fusion.case(2, 8, 9, 7))
    assert entry.problem is None
    assert entry.error < 1e-5
    (y,) = entry.run()
    (again,) = entry.run()
    assert torch.equal(y, again)


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_training_is_refused(name: str) -> None:
    installed(name)
    assert "no gradients" in prepared(name, harness.TRAINING, bench_fusion.case(1, 8, 8, 8)).problem


def test_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(case, inputs, *_):
        return peers.Built(lambda xs, ws: case.eager(xs, ws) * 1.01)

    monkeypatch.setitem(peers.PACKAGES, "openvino", ())
    monkeypatch.setitem(peers.BUILD, "openvino", build)
    assert "wrong" in prepared("openvino", harness.FORWARD, bench_fusion.case(1, 8, 8, 8)).problem


def test_other_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in peers.PACKAGES:
        monkeypatch.setitem(peers.PACKAGES, name, ())
        assert chosen(name, device=torch.device("cuda:0")) == (
            [],
            [f"without {name}: peers are compared on a CPU only"],
        )
    for dtype in (torch.bfloat16, torch.float16):
        none, (reason,) = chosen("onnxruntime", dtype)
        assert not none and "no convolution in" in reason


def test_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(peers.PACKAGES, "openvino", ("no_such_package",))
    monkeypatch.setattr(sys, "argv", ["bench_fusion.py", "--quick", "--device", "cpu", "--peers", "openvino"])
    # What main sets would hold for the tests that follow.
    monkeypatch.setattr(cli.options, "set_up_machine", lambda parser, args: (CPU, {}))
    with pytest.raises(SystemExit):
        cli.main(bench_fusion.BENCHMARK)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no_such_package" in said and "pip install 'refinenet_fast[bench]'" in said


def test_unknown_name(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.make_parser(bench_fusion.BENCHMARK).parse_args(["--peers", "openvino,tvm"])
    assert "expected some of onnxruntime, openvino; got 'tvm'" in capsys.readouterr().err


def test_none_unless_asked_for() -> None:
    args = cli.make_parser(bench_fusion.BENCHMARK).parse_args(["--quick", "--device", "cpu"])
    rivals = cli.choose(cli.fill_in(args, bench_fusion.BENCHMARK), CPU)
    assert not set(peers.PACKAGES) & {rival.name for rival in rivals}
