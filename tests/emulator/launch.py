"""A launch: a kernel of a built source, a grid, and arguments, over NumPy arrays."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emulator.errors import EmulatorError
from emulator.machine import Lanes, Machine
from emulator.memory import GlobalMemory
from emulator.parser import Kernel, parse

BUDGET = 1_000_000  # basic blocks that a group of lanes may run


@functools.cache
def nvcc_ptx(source: str, include: str, arch: str = "sm_80", nvcc: str = "nvcc") -> dict[str, Kernel]:
    """The kernels of a CUDA source, compiled to PTX with line numbers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.ptx")
        command = [nvcc, "-ptx", f"-arch={arch}", "-lineinfo", "-std=c++17", f"-I{include}", source, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"{' '.join(command)}: {done.stderr.strip()}")
        return parse(out.read_text())


def find(kernels: dict[str, Kernel], *parts: str) -> Kernel:
    """The one kernel whose (mangled) name has all ``parts`` in it."""
    found = [kernel for name, kernel in kernels.items() if all(re.search(part, name) for part in parts)]
    if len(found) != 1:
        raise EmulatorError(f"expected one kernel with {parts} in its name, got {[k.name for k in found]}")
    return found[0]


def emulate(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    parameters: bytes,
    memory: GlobalMemory,
    together: int = 1024,
    seed: int = 0,
) -> None:
    """Run ``grid`` x ``block`` threads.

    Args:
        parameters: The kernel's parameters as they lie in memory, device addresses from ``memory``.
        together: Threads that run as one group, in lockstep where they do not diverge; groups run one after another, in
            an order that ``seed`` shuffles.

    Raises:
        EmulatorError: The launch does not fit the kernel, or the kernel does what it must not.
    """
    full = [(*sizes, 1, 1)[:3] for sizes in (grid, block)]
    if min(min(sizes) for sizes in full) < 1 or int(np.prod(full[1])) > 1024:
        raise EmulatorError(f"{kernel.name}: expected sizes >= 1 and at most 1024 threads a block, got {grid}, {block}")
    (gx, gy, gz), (bx, by, bz) = full
    threads = np.array(
        [
            (*c[::-1], *t[::-1])
            for c in itertools.product(range(gz), range(gy), range(gx))
            for t in itertools.product(range(bz), range(by), range(bx))
        ],
        np.uint32,
    )  # (grid * block, 6): ctaid.xyz, tid.xyz
    machine = Machine(kernel, parameters, memory)
    groups = [threads[first : first + together] for first in range(0, len(threads), together)]
    for index in np.random.default_rng(seed).permutation(len(groups)):
        machine.run(_lanes(groups[index], full), BUDGET)


def _lanes(threads: np.ndarray, sizes: list[tuple[int, ...]]) -> Lanes:
    special = {}
    for k, axis in enumerate("xyz"):
        special[f"%ctaid.{axis}"], special[f"%tid.{axis}"] = threads[:, k], threads[:, 3 + k]
        special[f"%nctaid.{axis}"] = np.full(len(threads), sizes[0][k], np.uint32)
        special[f"%ntid.{axis}"] = np.full(len(threads), sizes[1][k], np.uint32)
    return Lanes(special)
