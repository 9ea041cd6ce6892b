"""PTX from this project's sources, by nvcc."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from emulator.errors import EmulatorError
from emulator.parser import Kernel, parse


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
