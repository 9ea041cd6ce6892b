"""PTX from this project's sources, by nvcc, and the versions of compilers that the emulator was checked with."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import refinenet_fast
from emulator.errors import EmulatorError
from emulator.parser import Kernel, parse

# What the whole suite was green with; of Triton 3.6 the PTX in tests/probes/triton-3.6.
CHECKED = {"nvcc": ("13.0.88",), "triton": ("3.6.0", "3.9.0")}

CSRC = Path(__file__).parents[2] / "csrc"
PROBES = Path(__file__).parents[1] / "probes"
_started: dict[tuple[str, str, str], Future[str]] = {}
_workers = ThreadPoolExecutor(2)


@functools.cache
def nvcc() -> str | None:
    """The wheel's that the test extra pins, else that of the build, else the machine's."""
    try:
        built = refinenet_fast.build_info()["cuda"]["compiler"]
    except RuntimeError:
        built = None
    places = [*(f"{path}/nvidia/cu13/bin/nvcc" for path in sys.path), built, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def nvcc_version() -> str:
    """ "13.0.88"."""
    told = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", told)[1]  # type: ignore[index]


def start(source: str | Path, arch: str, text: str = "") -> Future[str]:
    """Begin to compile a CUDA source, or ``text`` as if it stood there, to PTX with line numbers, in the background."""
    key = str(source), arch, text
    if key not in _started:
        _started[key] = _workers.submit(_compile, *key)
    return _started[key]


def compiled(source: str | Path, arch: str = "sm_80", text: str = "") -> dict[str, Kernel]:
    """The kernels of a CUDA source."""
    return _parsed(str(source), arch, text)


@functools.lru_cache(maxsize=8)
def _parsed(source: str, arch: str, text: str) -> dict[str, Kernel]:
    return parse(start(source, arch, text).result())


def _compile(source: str, arch: str, text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out, given = Path(folder, "out.ptx"), Path(source)
        if text:
            given = Path(folder, given.name)
            given.write_text(text)
        includes = [f"-I{CSRC}", f"-I{PROBES}"]
        command = [
            str(nvcc()),
            "-ptx",
            f"-arch={arch}",
            "-lineinfo",
            "-std=c++17",
            *includes,
            str(given),
            "-o",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise EmulatorError(f"{' '.join(command)}: {done.stderr.strip()}")
        return out.read_text()


def find(kernels: dict[str, Kernel], *parts: str) -> Kernel:
    """The one kernel whose (mangled) name has all ``parts`` in it."""
    found = [kernel for name, kernel in kernels.items() if all(re.search(part, name) for part in parts)]
    if len(found) != 1:
        raise EmulatorError(f"expected one kernel with {parts} in its name, got {[k.name for k in found]}")
    return found[0]
