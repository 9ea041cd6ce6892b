"""Times several functions in turn, so that a disturbance hits all of them. Needs torch only."""

import contextlib
import dataclasses
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch


@dataclasses.dataclass(frozen=True)
class Timed:
    """`call()` is what is timed; it runs inside `context()`, whose entry and exit are not."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext

    def __call__(self):
        with self.context():
            return self.call()


@dataclasses.dataclass(frozen=True)
class Summary:
    """Milliseconds: the median and the 20th and 80th percentiles of `rounds` samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int

    @classmethod
    def of(cls, samples):
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), p20, p80, len(samples))


# Seconds after which the threads of another run sleep: libgomp's spin for some milliseconds.
PAUSE = 0.02


def interleave(runs, device, seconds, at_least=5, at_most=200, apart=False):
    """Times `runs` round-robin for about `seconds`, at least `at_least` rounds; a Summary each.

    Every run has the same number of rounds. The caller has already run each of them, so
    compilation and the choice of algorithms are over.

    apart: the runs have thread pools of their own on the same cores. A pool spins for a while after a
    run, waiting for the next: on two cores OpenMP's threads made ONNX Runtime half as slow again in a
    residual conv unit at 32x32. So each run waits until the others' threads sleep, and wakes its own
    by a call that is not timed. All runs do, since that call warms the caches as well.
    """
    rounds = partial(_host_rounds, apart) if device.type == "cpu" else _cuda_rounds
    return [Summary.of(times) for times in rounds(runs, device, seconds, at_least, at_most)]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_rounds(apart, runs, device, seconds, at_least, at_most):
    """Wall-clock milliseconds, [run][round]."""
    times = [[] for _ in runs]
    end = time.perf_counter() + seconds
    for k in range(at_most):
        if k >= at_least and time.perf_counter() > end:
            break
        for run, mine in zip(runs, times):
            with run.context():
                if apart:
                    time.sleep(PAUSE)
                    run.call()
                start = time.perf_counter()
                result = run.call()
                mine.append((time.perf_counter() - start) * 1e3)
            del result  # freed outside the timed region, before the next run allocates
    return times


def _cuda_rounds(runs, device, seconds, at_least, at_most):
    """Device milliseconds between two events, with a cold L2, [run][round].

    The flush before each run also keeps the GPU busy while the CPU enqueues the run, so short
    runs are not timed by the speed of Python. Nothing waits for the GPU until the last round.
    """
    start = time.perf_counter()
    for run in runs:
        run()
    torch.cuda.synchronize(device)
    rounds = int(seconds / (time.perf_counter() - start))
    flush = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device)
    events = [[] for _ in runs]
    for _ in range(min(max(rounds, at_least), at_most)):
        for run, mine in zip(runs, events):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with run.context():
                flush.zero_()
                begin.record()
                run.call()
                end.record()
            mine.append((begin, end))
    torch.cuda.synchronize(device)
    return [[begin.elapsed_time(end) for begin, end in mine] for mine in events]


def l2_bytes(device):
    """The GPU's L2 size in bytes, and at least 128 MB, so that a flush also hides launches."""
    return max(torch.cuda.get_device_properties(device).L2_cache_size, 128 << 20)


class GaveUp(BaseException):
    """Not an Exception, so that no `except Exception` in between goes on with half a result."""


@contextlib.contextmanager
def patience(seconds, what):
    """Raises GaveUp where the block takes longer: some versions of torch.compile take minutes
    over the backward of a max pool. Python code of the main thread is interrupted, nothing else.
    """

    def give_up(*_):
        raise GaveUp(f"{what} took more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:  # a test runner may have its own alarm running
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
