"""What a measurement ran on, and what it did to memory. Needs torch only."""

import concurrent.futures
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
_keeps = False  # set_allocator("keep") was called


def set_allocator(choice):
    """Configures glibc's malloc for this process and returns the setting in words.

    By default glibc returns large blocks to the kernel when they are freed, so each result is
    page-faulted again on first touch, and that, not the kernel, is what gets measured. "keep"
    serves all blocks from the heap and never shrinks it. It holds for the whole process, that is
    for every contender alike. Call it before the first tensor.
    """
    if choice == "default":
        return "default"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "default (keep needs glibc)"
    global _keeps
    _keeps = bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return "keep" if _keeps else "default (mallopt refused keep)"


@contextlib.contextmanager
def _large_blocks_apart():
    """Where "keep" is set: large blocks are mappings of their own for now, and go back to the kernel when freed.

    Served from the heap, a peak depends on the holes that whatever ran before has left there: that
    of a decoder's training step, whose tensors are 240 MB, was 307 MB.
    """
    if _keeps:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 65536)
    try:
        yield
    finally:
        if _keeps:
            ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)


def _resident(field):
    """This process's memory in bytes: VmRSS now, or VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def peak_memory(call, device):
    """(bytes that `call()` needs at its peak on top of what was held before, what it returns).

    The bytes are None where that cannot be known.

    Inputs are held before, so they do not count; outputs do. On a GPU it is the caching
    allocator's count. On the CPU it is the resident set: free heap pages go back to the kernel
    first, so that touching them again counts, and the kernel's high-water mark is reset. There the
    call is made in a thread of its own, so that what kernels keep for each thread counts as well.
    Call it once before: what it loads and compiles at first is memory too.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset VmHWM to VmRSS
        before = _resident("VmRSS")
    except (AttributeError, OSError, LookupError, TypeError):
        return None, call()
    with _large_blocks_apart(), concurrent.futures.ThreadPoolExecutor(1) as thread:
        result = thread.submit(call).result()
        return max(0, _resident("VmHWM") - before), result


def cpu_model():
    """The processor's name as the kernel reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device):
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit():
    """The checkout's commit, with "+dirty" where it has uncommitted changes; None outside git."""

    def git(*arguments):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device, allocator):
    """The fields that let someone else reproduce a row, the same for all rows of one run."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_model(),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "allocator": allocator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "refinenet_fast": _version("refinenet_fast"),
        "commit": _git_commit(),
        "command": shlex.join(["python", *_command(sys.argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _command(argv):
    """argv as typed in the repository's root, less the files it writes."""
    script, arguments = Path(argv[0]).resolve(), list(argv[1:])
    for option in ("--json", "--plot", "--scratch"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    inside = script.is_relative_to(ROOT)
    return [os.fspath(script.relative_to(ROOT)) if inside else script.name, *arguments]
