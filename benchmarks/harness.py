"""A case, the gate every contender of ours passes before it is timed, and the measurement."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable

import torch

import machine
from contenders import Built, Contender
from refinenet_fast.testing import relative_l2, tolerance
from timing import GaveUp, Timed, interleave, patience

FORWARD, TRAINING = "forward", "forward+backward"
DIRECTIONS = (FORWARD, TRAINING)

# Seconds to build a contender for one case.
PATIENCE = {"cpu": 45, "cuda": 300}
_gave_up: set[tuple[str, str]] = set()  # (contender, direction)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One thing to compute, `y = f(xs, ws)`: activations xs, parameters ws.

    gradient_floor: the gradient error that is always let pass. The gradients of ReLU and max pool
    jump where two values tie, and one tie that rounding decides otherwise than float64 outweighs
    all other errors (PyTorch's float32 CRP is off by 1e-3); so the gate only stops gradients that
    are plainly wrong, and the tests compare them strictly, with the decisions held equal.
    """

    shape: tuple[int, int, int, int]  # (N, C, H, W) of the result
    work: dict[str, int]  # direction -> FLOPs, bytes or images
    unit: str  # "GFLOP/s", "GB/s" or "images/s"
    setup: Callable  # (dtype, device, generator) -> (xs, ws), the same for every contender
    eager: Callable  # plain PyTorch in any dtype: a contender, and in float64 the truth
    ours: Callable  # backend's name -> function(xs, ws)
    gradient_floor: float = 0.0
    error_floor: float = 0.0  # the error of the result that is always let pass
    trains: bool = True  # False: no gradients are wanted, nor computed for comparison
    patience: float = 1.0  # times as many seconds to build a contender as others have
    label: str = ""  # what tells it from other cases of its shape

    @property
    def name(self):
        return " ".join([*self.label.split(), "x".join(map(str, self.shape))])


def normal(shape, dtype, device, generator, scale=1.0):
    """Normal data of standard deviation `scale`, drawn on the CPU, so the same on any device."""
    x = (torch.randn(shape, generator=generator) * scale).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class Inputs:
    """What all contenders are handed for a case, the float64 truth, and PyTorch's own errors."""

    def __init__(self, case, dtype, device):
        generator = torch.Generator().manual_seed(0)
        xs, ws = case.setup(dtype, device, generator)
        self.xs = [x.requires_grad_() for x in xs]
        self.ws = [torch.nn.Parameter(w) for w in ws]
        with torch.inference_mode():
            shape = case.eager(self.xs, self.ws).shape
        self.gy = normal(shape, dtype, device, generator)
        self.truth = self._float64(case)
        own = _step(case, self.xs, self.ws, self.gy)
        self.eager_errors = list(map(relative_l2, own, self.truth))

    def _float64(self, case):
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            xs, ws = ([t.detach().double().requires_grad_() for t in ts] for ts in (self.xs, self.ws))
            return _step(case, xs, ws, self.gy.double())
        finally:
            torch.backends.cudnn.benchmark = benchmark


def _step(case, xs, ws, gy):
    """PyTorch's result, and its gradients where the case has any."""
    if case.trains:
        return training_step(case.eager, xs, ws, gy)
    with torch.no_grad():
        return [case.eager(xs, ws)]


def training_step(function, xs, ws, gy):
    """[y, then the gradient in each of xs and ws]."""
    y = function(xs, ws)
    return [y, *torch.autograd.grad(y, [*xs, *ws], gy)]


_latest: dict[tuple, Inputs] = {}  # one at most


def inputs_of(case, dtype, device):
    """Inputs, made once for all directions and contenders of a case that follow one another.

    Those of the case before are freed first: of a large network they are gigabytes.
    """
    key = case, dtype, device
    if key not in _latest:
        _latest.clear()
        _latest[key] = Inputs(case, dtype, device)
    return _latest[key]


@dataclasses.dataclass
class Entry:
    """A contender that is ready to be timed on a case, or the reason why it is not."""

    contender: Contender
    built: Built | None = None
    run: Timed | None = None
    error: float | None = None  # relative L2 against float64, the worst of y and all gradients
    peak_memory_bytes: int | None = None
    problem: str | None = None

    def fields(self):
        return {
            "contender": self.contender.name,
            "setting": self.built.setting if self.built else None,
            "error": self.error,
            "peak_memory_bytes": self.peak_memory_bytes,
            "problem": self.problem,
        }


def prepare(case, inputs, direction, contender):
    """Builds (and compiles) a contender for a case, holds it against float64, measures memory."""
    entry, device = Entry(contender), inputs.gy.device
    if (contender.name, direction) in _gave_up:
        entry.problem = "not tried, since an earlier shape took too long to compile"
        return entry
    timed = functools.partial(_timed, inputs, direction, contender)
    try:
        with patience(case.patience * PATIENCE[device.type], "building it"):
            built = entry.built = contender.build(case, inputs, direction == FORWARD, timed)
            entry.run = timed(built.function)
            entry.run()  # compiling, building, cuDNN's search and first calls need memory of their own
        peak, results = machine.peak_memory(entry.run, device)
        entry.peak_memory_bytes = None if built.keeps_memory else peak
        entry.error, entry.problem = _gate(case, inputs, contender, results)
    except GaveUp as error:
        entry.problem = str(error)
        _gave_up.add((contender.name, direction))
    except Exception as error:
        entry.problem = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return entry


def _timed(inputs, direction, contender, function):
    xs, ws, gy = inputs.xs, inputs.ws, inputs.gy

    @contextlib.contextmanager
    def inference():
        with torch.inference_mode(), contender.context():
            yield

    if direction == FORWARD:
        return Timed(lambda: [function(xs, ws)], inference)
    return Timed(lambda: training_step(function, xs, ws, gy), contender.context)


def _gate(case, inputs, contender, results):
    """(worst error, what is wrong with it or None); PyTorch's own are not judged."""
    leaves = [f"{kind}s[{i}]" for kind in "xw" for i in range(len(getattr(inputs, kind + "s")))]
    names = ["the result", *(f"the gradient of {leaf}" for leaf in leaves)]
    errors = list(map(relative_l2, results, inputs.truth))
    kernels, problem = contender.kernels, None
    filters = [w for w in inputs.ws if w.dim() == 4]
    winograd = any(kernels and kernels.is_winograd(x, w) for x in inputs.xs if x.dim() == 4 for w in filters)
    for name, error, own in zip(names, errors, inputs.eager_errors):
        floor = case.error_floor if name == names[0] else case.gradient_floor
        allowed = max(tolerance(inputs.gy.dtype, own, winograd), floor)
        if contender.allowed:
            allowed = contender.allowed[inputs.gy.dtype]
        if (contender.ours or contender.allowed) and not error <= allowed:
            problem = f"wrong: error of {name} is {error:.1e}, allowed are {allowed:.1e}"
    return max(errors), problem


def measure(case, dtype, device, direction, contenders, seconds, say):
    """One row for each contender, all timed in turn.

    seconds: (for everything, for timing at least). say: called with what is being done, for the
    progress bar.
    """
    start = time.monotonic()
    say(f"{case.name} {direction}: inputs and float64 truth")
    inputs = inputs_of(case, dtype, device)
    entries = []
    for contender in contenders:
        say(f"{case.name} {direction}: {contender.name}, compiling and checking")
        entries.append(prepare(case, inputs, direction, contender))
    ready = [entry for entry in entries if entry.problem is None]
    left = max(seconds[0] - (time.monotonic() - start), seconds[1])
    say(f"{case.name} {direction}: timing all in turn, about {left:.0f} s")
    least = 10 if device.type == "cuda" else 3
    apart = any(entry.contender.own_threads for entry in ready)
    times = interleave([entry.run for entry in ready], device, left, least, apart=apart) if ready else []
    timed = {entry.contender.name: summary for entry, summary in zip(ready, times)}
    rows = []
    for entry in entries:
        row = {"shape": case.name, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"direction": direction, **entry.fields()}
        rows.append(row | _rates(case, direction, timed.get(entry.contender.name), timed))
    return rows


def _rates(case, direction, time_ms, timed):
    """Times and what follows from them; None throughout for a contender that was not timed."""
    work, eager = case.work[direction], timed.get("eager")
    per_second = work / time_ms.median_ms * 1e3 if time_ms else None
    giga = per_second and per_second / 1e9
    return {
        "median_ms": time_ms and time_ms.median_ms,
        "p20_ms": time_ms and time_ms.p20_ms,
        "p80_ms": time_ms and time_ms.p80_ms,
        "rounds": time_ms and time_ms.rounds,
        "speedup_vs_eager": eager.median_ms / time_ms.median_ms if time_ms and eager else None,
        "gflops": giga if case.unit == "GFLOP/s" else None,
        "gbytes_per_s": giga if case.unit == "GB/s" else None,
        "images_per_s": per_second if case.unit == "images/s" else None,
    }
