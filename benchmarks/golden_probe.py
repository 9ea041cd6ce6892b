"""Runs the probe kernels on a GPU and keeps what they leave in memory, which holds the PTX emulator to the hardware.

    python benchmarks/golden_probe.py            # writes tests/probes/golden/sm_90.npz on an H100
    python benchmarks/golden_probe.py --list     # the probes; needs no GPU

Needs nvcc, and Triton for Triton's probes. Each CUDA source, and all of Triton's probes together, run in a process of
their own, which is started anew after a kernel that failed or hung: it costs no other probe its result. Every probe is
launched twice and has to leave the same bits. The table says which probes leave what they expect: where one does not,
either its expectation, and so perhaps the emulator, misreads the documentation, or the hardware departs from it. The
dump keeps the outputs all the same, each of them whole, about 2 MB before compression. The exit code is 1 if a probe
could not run. tests/golden.py has the format.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import driver
import golden
import machine
import options
from probes import Argument, Probe, all_probes, conv_probes

try:
    import triton

    from probes import triton_probes
except ImportError:  # no Triton for this platform: then without its probes
    triton = triton_probes = None

SOURCES = Path(__file__).resolve().parent.parent / "tests" / "probes"
TRITON = "Triton"  # in place of a source
RUNS = 2
STALL = 180.0  # seconds without a result, after which a process is stopped; the first result takes longest
BARREN = 3  # processes in a row without a result, after which the rest of a source is given up
LOST = 3  # exit code of a process whose context is lost, with what was at fault recorded
Capability = tuple[int, int]

# ---- what there is to run ---------------------------------------------------------------------


def known() -> dict[str, Any]:
    """Every Probe and TritonProbe by name."""
    probes = [*all_probes.PROBES, *conv_probes.PROBES, *(triton_probes.PROBES if triton else ())]
    return {probe.name: probe for probe in probes}


def source_of(probe: Any) -> str:
    return probe.source if isinstance(probe, Probe) else TRITON


def cannot_run(probe: Any, capability: Capability) -> str | None:
    """Why a device of that capability cannot run a probe; None if it can."""
    arch = capability[0] * 10 + capability[1]
    if isinstance(probe, Probe):
        least = int(re.sub(r"\D", "", probe.arch))
        # Code for sm_90a runs on 9.0 and on nothing else.
        fits = arch == least if probe.arch.endswith("a") else arch >= least
        return None if fits else f"needs {probe.arch}"
    if arch not in probe.archs and not (80 in probe.archs and arch >= 80):
        return "needs " + " or ".join(f"sm_{a}" for a in probe.archs)
    if not triton_probes.runs_with(probe, triton.__version__):
        return f"needs Triton {probe.since}"
    return None


def target(capability: Capability) -> str:
    """nvcc's -arch for a device: with what only that architecture has, where probes use it."""
    return f"sm_{capability[0]}{capability[1]}" + "a" * (capability[0] >= 9)


# ---- compiling --------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, places)), None)


def compile_source(nvcc: str, source: str, arch: str, folder: Path) -> str | None:
    """Writes <folder>/<source>.cubin; returns what nvcc says where it cannot."""
    out = folder / f"{source}.cubin"
    command = [nvcc, "-cubin", f"-arch={arch}", "-std=c++17", f"-I{SOURCES}", str(SOURCES / source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def triton_cubin(probe: Any, arch: int) -> tuple[bytes, dict[str, Any]]:
    """Triton's own machine code of a probe, which it leaves in its cache, and what a launch needs to know."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            _, metadata = triton_probes.compile_ptx(probe, arch)
        finally:
            if before is None:
                del os.environ["TRITON_CACHE_DIR"]
            else:
                os.environ["TRITON_CACHE_DIR"] = before
        (cubin,) = Path(cache).rglob("*.cubin")
        return cubin.read_bytes(), metadata


@dataclass(frozen=True)
class Compiled:
    """A probe's kernel on the device, and how it is launched."""

    function: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    shared: int
    parameters: Callable[[list[Argument]], list[Argument]]  # of the kernel, from the probe's arguments


def load(cuda: driver.Driver, probe: Any, folder: Path, capability: Capability) -> Compiled:
    """Loads what nvcc has left in ``folder``; compiles a Triton probe first."""
    if isinstance(probe, Probe):
        module = cuda.load((folder / f"{probe.source}.cubin").read_bytes())
        function = cuda.function(module, probe.kernel)
        return Compiled(function, probe.grid, probe.block, probe.cluster, probe.shared, list)
    cubin, metadata = triton_cubin(probe, capability[0] * 10 + capability[1])
    function = cuda.function(cuda.load(cubin), metadata["name"])
    grid, block, cluster = triton_probes.launch_shape(probe, metadata)
    return Compiled(
        function,
        grid,
        block,
        cluster,
        metadata["shared"],
        lambda arguments: triton_probes.launch_arguments(probe, metadata, arguments),
    )


# ---- a worker: some probes of one source ------------------------------------------------------


def run_probe(cuda: driver.Driver, probe: Any, compiled: Compiled) -> dict[str, np.ndarray]:
    """What a dump keeps of the probe.

    Raises:
        RuntimeError: Launched again, it leaves other bits.
    """
    runs = []
    for _ in range(RUNS):
        arguments = probe.arguments(np.random.default_rng(0))
        cuda.launch(
            compiled.function,
            compiled.grid,
            compiled.block,
            compiled.parameters(arguments),
            cluster=compiled.cluster,
            shared=compiled.shared,
        )
        runs.append(golden.outputs(probe.name, probe.outputs, arguments))
    for name, first in runs[0].items():
        if any(first.tobytes() != run[name].tobytes() for run in runs[1:]):
            raise RuntimeError(f"{name}: other bits each time it is launched")
    return runs[0]


def work(names: list[str], folder: Path, capability: Capability) -> None:
    """Runs probes one after another; <folder>/<name>.npz has each one's outputs, or <name>.error says what failed."""
    probes = known()
    cuda = driver.Driver(torch.device("cuda", 0))
    for name in names:
        try:
            outputs = run_probe(cuda, probes[name], load(cuda, probes[name], folder, capability))
        except driver.LaunchError as error:
            fail(folder, name, str(error))
            os._exit(LOST)  # a kernel that hangs would hold up an orderly exit
        except Exception as error:
            fail(folder, name, f"{type(error).__name__}: {error}")
        else:
            partial = folder / f"{name}.partial.npz"
            np.savez(partial, **outputs)  # type: ignore[arg-type]
            os.replace(partial, folder / f"{name}.npz")


def fail(folder: Path, name: str, why: str) -> None:
    partial = folder / f"{name}.partial.error"
    partial.write_text(" ".join(why.split())[:2000])
    os.replace(partial, folder / f"{name}.error")


def unfinished(names: Iterable[str], folder: Path) -> list[str]:
    return [name for name in names if not any((folder / f"{name}{end}").exists() for end in (".npz", ".error"))]


# ---- running workers --------------------------------------------------------------------------


class Process(Protocol):
    """What run_all needs of a multiprocessing.Process that has been started."""

    exitcode: int | None

    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...


def start_worker(names: list[str], folder: Path, capability: Capability) -> Any:
    # CUDA cannot be used in a forked process.
    process = multiprocessing.get_context("spawn").Process(target=work, args=(names, folder, capability), daemon=True)
    process.start()
    return process


def watch(process: Process, names: list[str], folder: Path, stall: float) -> str | None:
    """Until a worker ends; what is wrong with it, if not all of its probes are finished and it does not say why."""
    count, since = len(unfinished(names, folder)), time.monotonic()
    while process.is_alive():
        process.join(0.5)
        left = len(unfinished(names, folder))
        if left < count:
            count, since = left, time.monotonic()
        elif time.monotonic() - since > stall:
            process.kill()
            process.join(30)
            return f"no result after {stall:g} s"
    return None if process.exitcode == LOST else f"the process ended with exit code {process.exitcode}"


def run_all(start: Callable[[list[str]], Process], names: list[str], folder: Path, stall: float = STALL) -> None:
    """Has workers run all of these probes: a new one after each that ended early, for those that are left."""
    barren = 0  # workers in a row that finished no probe
    while names:
        wrong = watch(start(names), names, folder, stall)
        left = unfinished(names, folder)
        barren = barren + 1 if left == names else 0
        if left and (wrong or barren):
            # Workers go in order: the first that is left was running. Where no worker gets anywhere, it is no probe's
            # fault, and the others are not tried.
            for name in left if barren == BARREN else left[:1]:
                fail(folder, name, wrong or "the process ended early")
        names = unfinished(left, folder)


# ---- the results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One line of the table; ``verdict`` is "agrees", "differs" or "failed"."""

    name: str
    verdict: str
    words: str


def judge(probe: Any, outputs: dict[str, np.ndarray] | None, error: str) -> Result:
    """Holds a probe's outputs, None if it failed with ``error``, to what it expects."""
    if outputs is None:
        return Result(probe.name, "failed", error)
    try:
        expected = probe.expected(probe.arguments(np.random.default_rng(0)))
        found = [
            golden.compare(outputs[golden.key(probe.name, position)], np.asarray(want), probe.tolerance)
            for position, want in zip(probe.outputs, expected, strict=True)
        ]
    except Exception as raised:
        return Result(probe.name, "differs", f"its expectation fails: {type(raised).__name__}: {raised}")
    verdict = "agrees" if all(agrees for agrees, _ in found) else "differs"
    said = [f"{position}: {words}" for position, (_, words) in zip(probe.outputs, found)]
    return Result(probe.name, verdict, "; ".join(said) if len(said) > 1 else found[0][1])


def gather(name: str, folder: Path) -> tuple[dict[str, np.ndarray] | None, str]:
    """What a worker left of a probe: its outputs and "", or None and the error."""
    try:
        with np.load(folder / f"{name}.npz") as file:
            return dict(file), ""
    except FileNotFoundError:
        return None, (folder / f"{name}.error").read_text()


def show(results: list[Result]) -> None:
    """The table, with what needs a look at its end."""
    width = max(len(result.name) for result in results)
    verdicts = ("agrees", "differs", "failed")
    for verdict in verdicts:
        for result in results:
            if result.verdict == verdict:
                print(f"{result.name:<{width}}  {verdict:<7}  {result.words}")
    counts = {verdict: sum(result.verdict == verdict for result in results) for verdict in verdicts}
    print(f"{len(results)} probes: {counts['agrees']} agree, {counts['differs']} differ, {counts['failed']} failed")


def describe(nvcc: str, capability: Capability) -> dict[str, Any]:
    """What the dump was made on and by."""
    device = torch.device("cuda", 0)
    whole = machine.describe(device, "default")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", version)
    return {
        "compute_capability": f"{capability[0]}.{capability[1]}",
        "target": target(capability),
        "driver": driver_version(),
        "driver_cuda": driver.Driver(device).version(),
        "nvcc": found[1] if found else None,
        **{key: whole[key] for key in ("device_name", "python", "torch", "triton", "commit", "command", "date")},
        "numpy": np.__version__,
    }


def driver_version() -> str | None:
    """Of the kernel's module: "580.95.05"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


# ---- command line -----------------------------------------------------------------------------


def parse() -> Any:
    parser = options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the probes and end")
    parser.add_argument("--out", type=Path, default=golden.FOLDER, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--match", default="", metavar="TEXT", help="only probes with TEXT in their names, no dump")
    parser.add_argument("--nvcc", default=find_nvcc(), help="default: CUDA_HOME's, PATH's, /usr/local/cuda's")
    args = parser.parse_args()
    if args.list:
        return args
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use; --list lists the probes")
    if not (args.nvcc and shutil.which(args.nvcc)):
        parser.error(f"expected an nvcc, got {args.nvcc}; name one with --nvcc")
    return args


def main() -> int:
    args = parse()
    probes = {name: probe for name, probe in known().items() if args.match in name}
    if triton is None:
        print("without Triton's probes: there is no Triton", file=sys.stderr)
    if args.list:
        for name, probe in probes.items():
            arch = probe.arch if isinstance(probe, Probe) else ", ".join(f"sm_{a}" for a in probe.archs)
            print(f"{name:<44} {source_of(probe):<13} {probe.kernel:<22} {arch}")
        return 0
    capability = torch.cuda.get_device_capability(0)
    for name in list(probes):
        if reason := cannot_run(probes[name], capability):
            print(f"without {name}: {reason}", file=sys.stderr)
            del probes[name]
    if not probes:
        print("no probe to run", file=sys.stderr)
        return 1
    meta = describe(args.nvcc, capability)
    print(f"{meta['device_name']}, driver {meta['driver']}, nvcc {meta['nvcc']}, Triton {meta['triton']}", flush=True)
    results, arrays = measure(probes, args.nvcc, capability)
    show(results)
    if arrays and not args.match:
        path = golden.save(f"sm_{capability[0]}{capability[1]}", arrays, meta, args.out)
        print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.2f} MB")
    return int(any(result.verdict == "failed" for result in results))


def measure(probes: dict[str, Any], nvcc: str, capability: Capability) -> tuple[list[Result], dict[str, np.ndarray]]:
    """Every probe's line of the table, and the arrays of the dump."""
    sources: dict[str, list[str]] = {}
    for name, probe in probes.items():
        sources.setdefault(source_of(probe), []).append(name)
    results, arrays = [], {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {
                source: pool.submit(compile_source, nvcc, source, target(capability), folder)
                for source in sources
                if source != TRITON
            }
        for source, names in sources.items():
            start = time.monotonic()
            error = compiling[source].result() if source in compiling else None
            if error:
                for name in names:
                    fail(folder, name, error)
            else:
                run_all(lambda left: start_worker(left, folder, capability), names, folder)
            print(f"{source}: {len(names)} probes, {time.monotonic() - start:.0f} s", flush=True)
        for name, probe in probes.items():
            outputs, error = gather(name, folder)
            arrays.update(outputs or {})
            results.append(judge(probe, outputs, error))
    return results, arrays


if __name__ == "__main__":
    sys.exit(main())
