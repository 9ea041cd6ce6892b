"""Some of the random cases of every op on the compiled core, and that a wrong one is noticed and can be run again."""

from __future__ import annotations

import pytest

import random_cases
from refinenet_fast import _native
from refinenet_fast.backends import get

if _native._C is None:
    pytest.skip(f"{_native.missing}", allow_module_level=True)


@pytest.mark.parametrize("op", random_cases.OPS)
def test_forty_of_each(op):
    assert random_cases.run(op, range(40)) == []


def test_a_case_is_the_same_each_time(capsys):
    for _ in range(2):
        assert random_cases.run("rcu", [7], verbose=True) == []
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("--ops rcu --seed 0 --only 7 ")


def test_a_wrong_kernel_is_reported_with_the_line_that_runs_it_again(monkeypatch):
    cpu = type(get("cpu"))
    right = cpu.maxpool5_backward
    monkeypatch.setattr(cpu, "maxpool5_backward", lambda *arguments: right(*arguments) * 1.001)
    (found,) = random_cases.run("maxpool5", [3], dtype="float32")
    wrong, again = found.splitlines()
    assert wrong.startswith("maxpool5 backward: error 0.001, limit ")
    assert again.strip().startswith(
        "python tests/random_cases.py --ops maxpool5 --seed 0 --only 3 --backend cpu --dtype float32  #"
    )
