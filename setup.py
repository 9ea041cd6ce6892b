"""Builds the extension module refinenet_fast._C with CMake; pyproject.toml holds the rest.

Environment variables, none of them needed:

REFINENET_FAST_CUDA        auto (default), on (an error where CUDA cannot be built) or off
REFINENET_FAST_NVCC        the path of an nvcc; or "pypi": NVIDIA's wheels, whatever the machine has
REFINENET_FAST_CUDA_ARCHS  architectures as CMake writes them, such as "90a;120"
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# One minor version throughout: ptxas refuses what a newer nvvm writes.
COMPILER_WHEELS = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]


def cuda_mode() -> str:
    mode = os.environ.get("REFINENET_FAST_CUDA") or "auto"
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"REFINENET_FAST_CUDA: expected auto, on or off, got {mode!r}")
    return mode


def machine_nvcc() -> str | None:
    """The nvcc that the user names, or else the first in the usual places."""
    named = os.environ.get("REFINENET_FAST_NVCC")
    if named == "pypi":
        return None
    if named:
        if not shutil.which(named):
            raise SystemExit(f"REFINENET_FAST_NVCC: expected an nvcc's path or pypi, got {named!r}")
        return shutil.which(named)
    places = [os.environ.get("CUDACXX")]
    places += [f"{os.environ[k]}/bin/nvcc" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    places += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, (shutil.which(place) for place in places if place)), None)


def wheel_nvcc() -> str | None:
    """The nvcc of NVIDIA's wheels, if the environment of this build has them."""
    return next(filter(None, (shutil.which(f"{p}/nvidia/cu13/bin/nvcc") for p in sys.path)), None)


def compiler_wheels() -> list[str]:
    """What pip adds to the build environment: a CUDA compiler, where the machine has none."""
    there_are_wheels = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    if cuda_mode() == "off" or machine_nvcc() or not there_are_wheels:
        return []
    return COMPILER_WHEELS


def cuda_options() -> list[str]:
    mode, nvcc = cuda_mode(), machine_nvcc() or wheel_nvcc()
    if mode == "off":
        return ["-DREFINENET_FAST_CUDA=off"]
    if nvcc:
        return [f"-DREFINENET_FAST_CUDA={mode}", f"-DREFINENET_FAST_NVCC={nvcc}"]
    reason = "the build environment has none of NVIDIA's compiler wheels"
    if os.environ.get("REFINENET_FAST_NVCC") != "pypi":
        reason = f"there is no nvcc on this machine, and {reason}"
    if mode == "on":
        raise SystemExit(f"REFINENET_FAST_CUDA is on, but {reason}")
    return ["-DREFINENET_FAST_CUDA=off", f"-DREFINENET_FAST_CUDA_OFF_BECAUSE={reason}"]


def require_cxx() -> None:
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in named or ("c++", "g++", "clang++")):
        got = f" (got CXX={named[0]!r}, which is not there)" if named else ""
        raise SystemExit(f"refinenet_fast needs a C++17 compiler: install g++ or clang++, or set CXX{got}")


def build_tool(name: str) -> str:
    """Also from the scripts of an environment that is not activated, so not on PATH."""
    path = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not path:
        raise SystemExit(f"building refinenet_fast needs {name}: pip install {name}")
    return path


def forget_configuration(build: Path) -> None:
    """Keeps the compiled objects, but no path into an isolated environment that is gone."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    (build / "why_it_stopped.txt").unlink(missing_ok=True)
    for compilers in build.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(compilers)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        require_cxx()
        cmake = build_tool("cmake")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DREFINENET_FAST_PYTHON=on",
            "-DREFINENET_FAST_BUILD_TESTS=OFF",
            *cuda_options(),
        ]
        forget_configuration(build)
        configured = subprocess.run(configure, capture_output=True, text=True)
        if configured.returncode:
            stopped = build / "why_it_stopped.txt"
            raise SystemExit(
                stopped.read_text()
                if stopped.exists()
                else configured.stdout + configured.stderr + "CMake could not configure the build"
            )
        # What is built and what is left out: `pip install -v` shows it.
        print(configured.stdout + configured.stderr, flush=True)
        if subprocess.run([cmake, "--build", str(build)]).returncode:
            raise SystemExit("refinenet_fast could not be compiled; the compiler's errors are above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


setup(
    packages=find_packages(include=["refinenet_fast", "refinenet_fast.*"])
    + ["refinenet_fast.kernels"]
    + [f"refinenet_fast.kernels.{name}" for name in find_packages("kernels")],
    package_dir={"refinenet_fast.kernels": "kernels"},
    ext_modules=[Extension("refinenet_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=compiler_wheels(),
)
