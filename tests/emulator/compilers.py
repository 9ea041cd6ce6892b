"""PTX from this project's sources, by nvcc, and the versions of compilers that the emulator was checked with."""

from __future__ import annotations

import functools
import hashlib
import os
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
Headers = tuple[tuple[str, str], ...]  # (path below csrc, text in place of the file's)
_started: dict[tuple[str, str, str, Headers], Future[str]] = {}
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


def start(source: str | Path, arch: str, text: str = "", headers: Headers = ()) -> Future[str]:
    """Begin to compile a CUDA source, or ``text`` as if it stood there, to PTX with line numbers, in the background."""
    key = str(source), arch, text, headers
    if key not in _started:
        _started[key] = _workers.submit(_compile, *key)
    return _started[key]


def compiled(source: str | Path, arch: str = "sm_80", text: str = "") -> dict[str, Kernel]:
    """The kernels of a CUDA source."""
    return _parsed(str(source), arch, text, "")


def one(source: str | Path, arch: str, name: str, text: str = "", headers: Headers = ()) -> Kernel:
    """One kernel of a CUDA source, without reading the others."""
    return _parsed(str(source), arch, text, name, headers)[name]


@functools.lru_cache(maxsize=64)
def picked(source: str | Path, arch: str, part: str, text: str = "", headers: Headers = ()) -> Kernel:
    """The one kernel of a CUDA source whose mangled name has ``part`` in it, without reading the others."""
    ptx = start(source, arch, text, headers).result()
    found = [name for name in re.findall(r"^(?:\.visible )?\.entry (\w+)\(", ptx, flags=re.M) if part in name]
    if len(found) != 1:
        raise EmulatorError(f"expected one kernel with {part} in its name, got {found}")
    return one(source, arch, found[0], text, headers)


@functools.lru_cache(maxsize=8)
def _parsed(source: str, arch: str, text: str, name: str, headers: Headers = ()) -> dict[str, Kernel]:
    ptx = start(source, arch, text, headers).result()
    if name:  # what comes before the first kernel, the kernel, and the names of source files
        head, *kernels = re.split(r"(?=^(?:\.visible )?\.entry )", ptx, flags=re.M)
        mine = [k for k in kernels if re.match(rf"(?:\.visible )?\.entry {name}\(", k)]
        ptx = "".join([head, *mine, *re.findall(r"^\s*\.file.*\n", ptx, flags=re.M)])
    return parse(ptx)


def _kept(key: str) -> Path | None:
    """Where the processes of one run of pytest share what they compile; None: there is one process."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if not run:
        return None
    folder = Path(tempfile.gettempdir(), f"refinenet_fast-{run}")
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.ptx"


def _compile(source: str, arch: str, text: str, headers: Headers) -> str:
    kept = _kept(f"{source} {arch} {text} {headers}")
    if kept and kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        out, given = Path(folder, "out.ptx"), Path(source)
        if text:
            given = Path(folder, given.name)
            given.write_text(text)
        for path, changed in headers:
            Path(folder, path).parent.mkdir(exist_ok=True)
            Path(folder, path).write_text(changed)
        includes = [f"-I{path}" for path in (folder, CSRC, PROBES)]  # first found wins
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
        ptx = out.read_text()
        if kept:
            os.replace(shutil.copy(out, f"{kept}.{os.getpid()}"), kept)
        return ptx


def find(kernels: dict[str, Kernel], *parts: str) -> Kernel:
    """The one kernel whose (mangled) name has all ``parts`` in it."""
    found = [kernel for name, kernel in kernels.items() if all(re.search(part, name) for part in parts)]
    if len(found) != 1:
        raise EmulatorError(f"expected one kernel with {parts} in its name, got {[k.name for k in found]}")
    return found[0]
