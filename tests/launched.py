"""The CUDA backend's own host code, csrc/bindings.cpp and the launchers, over a runtime without a GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from emulator.compilers import CSRC

FAKE = CSRC / "tests" / "fake_cuda"


class Launched(NamedTuple):
    """What the runtime was asked for; ``name`` as g++ mangles it."""

    name: str
    blocks: int
    threads: int
    cluster: int
    shared: int
    allowed: int
    device: int
    stream: int
    arguments: tuple[bytes, ...]


class Core(NamedTuple):
    """``module`` is ``refinenet_fast._C``, without the kernels for CPUs; ``names`` those of its functions by place."""

    module: ModuleType
    library: ctypes.CDLL
    names: dict[int, str]

    def begin(self, capability: int, processors: int) -> None:
        """A new runtime of one such device, which has launched nothing."""
        self.library.fake_begin(capability, processors)

    def launches(self) -> list[Launched]:
        found = []
        for line in self.library.fake_launches().decode().splitlines():
            words = line.split()
            numbers = [int(word) for word in words[:8]]
            arguments = tuple(bytes.fromhex(word) for word in words[8:])
            found.append(Launched(self.names[numbers[0]], *numbers[1:], arguments))
        return found


def compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def core() -> Core:
    """Built on first use, without optimisation: in some seconds."""
    folder = tempfile.mkdtemp(prefix="refinenet_fast-launched-")
    try:
        return _loaded(_built(Path(folder)))
    finally:
        shutil.rmtree(folder)


def _built(folder: Path) -> Path:
    import pybind11

    path = folder / "_C.so"
    (folder / "build_info.h").write_text('#define REFINENET_FAST_BUILD_INFO_JSON "{}"\n')
    includes = FAKE, CSRC, folder, pybind11.get_include(), sysconfig.get_paths()["include"]
    # The optimiser has nothing to do, and bodies of kernels, which nobody calls, are full of what it would warn of.
    flags = "-std=c++17", "-O0", "-w", "-fPIC", "-fvisibility=hidden", "-shared"
    defined = "-DREFINENET_FAST_WITH_CUDA", "-DREFINENET_FAST_SM90A"
    sources = CSRC / "bindings.cpp", FAKE / "launches.cpp", *sorted((CSRC / "cuda").glob("*.cu"))
    command = [compiler(), *flags, *defined, *(f"-I{i}" for i in includes), "-x", "c++", *sources, "-o", path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def _loaded(path: Path) -> Core:
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.fake_launches.restype = ctypes.c_char_p
    symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
    names = {int(words[0], 16): words[2] for words in map(str.split, symbols.splitlines()) if len(words) == 3}
    return Core(module, library, names)
