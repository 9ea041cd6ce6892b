"""benchmarks/gpu_sanitizers.py: what it asks of compute-sanitizer, and what it makes of the answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
sanitizers = pytest.importorskip("gpu_sanitizers", reason="needs the checkout's benchmarks/")

# In its place: notes how it is called, says what the file <tool> says, and exits with that file's first line.
TOOL = """#!/bin/sh
folder=$(dirname "$0")
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> "$folder/calls"
tail -n +2 "$folder/$2"
exit $(head -n 1 "$folder/$2")
"""
CLEAN = "0\n========= COMPUTE-SANITIZER\n========= 7 passed in 3 s =========\n========= ERROR SUMMARY: 0 errors\n"
RACE = """86
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at conv_kernel+0x70
=========     and Read access at conv_kernel+0x90 [16 hazards]
========= 7 passed in 3 s =========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Exit code, stdout and stderr of the script, where a GPU seems to be and the tools say so."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitizers.machine, "describe", lambda *_: {"device": "a GPU"})

    def run(*words, **said):
        for name, text in said.items():
            (tmp_path / name).write_text(text)
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv = ["gpu_sanitizers.py", *map(str, words)]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = sanitizers.main()
            except SystemExit as left:
                code = left.code
        return code, out.getvalue(), err.getvalue()

    return run


def test_every_tool_runs_the_tests_that_a_gpu_runs(run, tmp_path):
    clean = dict.fromkeys(sanitizers.TOOLS, CLEAN)
    code, out, _ = run("--json", tmp_path / "out.json", **clean)
    assert code == 0 and out.count("nothing found") == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["memcheck", "racecheck", "synccheck"]
    for call in calls:
        assert call.startswith("1 --tool ") and "-m pytest -m gpu" in call
        assert "--kernel-name kernel_substring=refinenet_fast" in call and "--error-exitcode 86" in call
        assert "tests/test_gpu.py" in call and "tests/test_cuda_conv3x3.py" in call
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["meta"] == {"device": "a GPU"}
    assert [(row["tool"], row["found"], row["error"]) for row in content["tools"]] == [
        (tool, 0, None) for tool in sanitizers.TOOLS
    ]


def test_what_is_found_is_kept(run, tmp_path):
    code, out, _ = run("--tools", "racecheck", "--json", tmp_path / "out.json", racecheck=RACE)
    assert code == 1 and out == "racecheck: found 1; ========= 7 passed in 3 s =========\n"
    (row,) = json.loads((tmp_path / "out.json").read_text())["tools"]
    assert row["found"] == 1 and row["exit_code"] == 86 and row["said"][0].startswith("Error: Race reported")


@pytest.mark.parametrize(
    "said, error",
    [
        (CLEAN.replace("0\n", "1\n", 1), "exit code 1, a summary"),
        ("0\n=== no summary ===\n", "exit code 0, no summary"),
        (CLEAN.replace("0 errors", "3 errors"), "found 3"),
    ],
)
def test_what_did_not_end_well(run, said, error):
    code, out, _ = run("--tools", "memcheck", "tests/test_cuda_conv3x3.py", "-k", "1x1", memcheck=said)
    assert code == 1 and out.startswith(f"memcheck: {error};")


def test_only_the_tests_that_are_named(run, tmp_path):
    run("--tools", "memcheck", "tests/test_cuda_conv3x3.py", "-k", "1x1", memcheck=CLEAN)
    assert (tmp_path / "calls").read_text().rstrip().endswith("-p no:xdist tests/test_cuda_conv3x3.py -k 1x1")


def test_what_it_cannot_do_without(run, monkeypatch):
    code, _, said = run("--sanitizer", "no-such-tool")
    assert code == 2 and said == "gpu_sanitizers.py: no-such-tool was not found: it is part of the CUDA toolkit\n"
    assert run("--tools", "leakcheck")[2].endswith("expected some of memcheck, racecheck, synccheck; got 'leakcheck'\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run()[0] == 2 and "this machine has no GPU" in run()[2]
