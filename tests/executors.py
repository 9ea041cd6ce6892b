"""Where a test's kernels run: in PyTorch, in Triton's interpreter, in the emulator of PTX, on a GPU.

``@pytest.mark.runs_on("reference", "emulator", "gpu")`` runs a test once on each of these, handing it the
``Executor`` as the fixture ``executor``; where one is not available the test is skipped, with the reason.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from emulator import LOCKSTEP, Schedule, parse
from emulator.backend import Emulated
from emulator.compilers import CSRC, nvcc
from probes.triton_launch import TritonProbe, compile_ptx
from refinenet_fast import backends

NAMES = ("reference", "interpreter", "emulator", "emulator-sm90a", "gpu")  # the emulator: of sm_80, or as it says
INTERPRET = Path(__file__).with_name("interpret.py")
needs_nvcc = pytest.mark.skipif(not nvcc() or not CSRC.exists(), reason="needs an nvcc, and the sources")


@dataclass(frozen=True)
class Executor:
    """One of ``NAMES``."""

    name: str

    @property
    def device(self) -> str:
        return "cuda:0" if self.name == "gpu" else "cpu"

    def unavailable(self) -> str | None:
        """Why it cannot be used; None: it can."""
        if self.name == "gpu" and not torch.cuda.is_available():
            return "there is no GPU"
        if self.name.startswith("emulator") and not (nvcc() and CSRC.exists()):
            return "there is no nvcc, or there are no sources"
        return None

    def kernels(self, schedule: Schedule = LOCKSTEP) -> backends.Backend:
        """A backend, for whatever tests a backend.

        Raises:
            ValueError: It runs no backend.
        """
        if self.name == "interpreter":
            raise ValueError("what Triton interprets needs a process of its own: tests/test_triton.py")
        if self.name == "emulator":
            return Emulated(schedule=schedule)
        if self.name == "emulator-sm90a":  # as many blocks as one cluster has, for several tiles
            return Emulated("sm_90a", schedule, processors=2)
        return backends.get("cuda" if self.name == "gpu" else "reference")

    def outputs(self, probe: TritonProbe, schedule: Schedule = LOCKSTEP) -> list[np.ndarray]:
        """Of a Triton probe: a list of the arrays that it writes."""
        from probes.run import emulated_triton

        if self.name == "reference":
            return probe.expected(probe.arguments(np.random.default_rng(0)))
        if self.name == "emulator":
            text, metadata = compile_ptx(probe, probe.archs[-1])
            (kernel,) = parse(text).values()
            return emulated_triton(probe, kernel, metadata, schedule)
        return launched(probe.name, self.device)


def launched(name: str, device: str) -> list[np.ndarray]:
    """A Triton probe's outputs, launched by Triton itself in a process of its own, interpreted where there is no GPU.

    What the interpreter has touched cannot be compiled in the same process.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.npz")
        command = [sys.executable, str(INTERPRET), name, device, str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
        with np.load(out) as file:
            return [file[key] for key in file.files]
