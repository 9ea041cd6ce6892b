"""Who is compared: PyTorch eager, torch.compile, and each refinenet_fast backend that can run."""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

import refinenet_fast
from refinenet_fast import backends
from timing import interleave

SM80_LOOP = "cuda-sm80-loop"  # the backend "cuda" on Hopper without TMA and wgmma


@dataclasses.dataclass(frozen=True)
class Built:
    """A contender's function for one case: `function(xs, ws)` gives y."""

    function: Callable[[list, list], torch.Tensor]
    setting: str | None = None  # what was chosen, where there was a choice
    keeps_memory: bool = False  # from call to call, so that counting finds none: a CUDA graph, a peer


@dataclasses.dataclass(frozen=True)
class Contender:
    """`build(case, inputs, forward, timed)` gives a Built.

    forward: only the result is wanted, no gradients. timed(function): what the harness will time,
    for a contender that tries several settings.
    """

    name: str
    build: Callable[..., Built]
    ours: bool = False  # held against float64 before it is timed
    kernels: backends.Backend | None = None  # of ours
    allowed: dict[torch.dtype, float] | None = None  # the error against float64 that a peer may have
    own_threads: bool = False  # not those of PyTorch and our backends
    compiles: bool = False  # on its first call
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def known():
    """Every name that can be asked for."""
    return ("eager", "compile", *(info.name for info in refinenet_fast.list_backends()), SM80_LOOP)


def cannot_run(name, device, dtype):
    """Why a contender cannot run here, or None."""
    if name in ("eager", "compile"):
        return None
    if name == SM80_LOOP:
        return cannot_run("cuda", device, dtype) or _has_one_loop(device, dtype)
    backend = backends.get(name)
    return backend.unavailable() or backend.can_run(device, dtype)


def _has_one_loop(device, dtype):
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0) and dtype != torch.float32:
        return None
    return f"the loop of sm_80 is the only one for {dtype} on sm_{capability[0]}{capability[1]}"


def contender(name):
    if name == "eager":
        return Contender(name, lambda case, *_: Built(case.eager))
    if name == "compile":
        return Contender(name, _compile, compiles=True)
    backend = "cuda" if name == SM80_LOOP else name
    build = lambda case, *_: Built(case.ours(backend))  # noqa: E731
    context = _by_the_sm80_loop if name == SM80_LOOP else partial(refinenet_fast.use_backend, name)
    return Contender(name, build, ours=True, kernels=backends.get(backend), context=context)


@contextlib.contextmanager
def _by_the_sm80_loop():
    kernels = backends.get("cuda")
    kernels.sm80_loop = True
    try:
        with refinenet_fast.use_backend("cuda"):
            yield
    finally:
        kernels.sm80_loop = False


# ---- torch.compile, as strong as a user would make it ---------------------------------------


class Block(torch.nn.Module):
    """A case as the module a user would compile: parameters are known to stay where they are."""

    def __init__(self, function, ws):
        super().__init__()
        self.function = function
        self.ws = torch.nn.ParameterList(ws)

    def forward(self, *xs):
        return self.function(list(xs), list(self.ws))


def _compile(case, inputs, forward, timed):
    torch._dynamo.config.recompile_limit = 64  # by default it gives up after eight shapes
    block = Block(case.eager, inputs.ws)
    if inputs.xs[0].is_cuda:
        return _compile_cuda(block, inputs, timed)
    # Freezing packs the weights once instead of at every call; training cannot have it. There one
    # compilation serves every height and width: no slower beyond noise than one for each, which
    # would take a CPU ten seconds each.
    settings = {"options": {"freezing": True}, "dynamic": False} if forward else {"dynamic": True}
    compiled = torch.compile(block, **settings)
    return Built(lambda xs, ws: compiled(*xs), _in_words(settings))


def _compile_cuda(block, inputs, timed):
    """The faster of max-autotune with CUDA graphs and without: a graph must copy gradients in."""
    for x in inputs.xs:
        torch._dynamo.mark_static_address(x)  # else a graph would copy its inputs as well
    built = []
    for mode in ("max-autotune", "max-autotune-no-cudagraphs"):
        compiled = torch.compile(block, mode=mode, dynamic=False)
        graphs = mode == "max-autotune"
        built.append(Built(partial(_step, compiled, graphs), _in_words({"mode": mode}), graphs))
    runs = [timed(b.function) for b in built]
    for run in runs * 3:  # a CUDA graph warms up, records and replays
        run()
    times = interleave(runs, inputs.xs[0].device, seconds=0.2)
    return min(zip(built, times), key=lambda pair: pair[1].median_ms)[0]


def _step(compiled, graphs, xs, ws):
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    return compiled(*xs)


def _in_words(settings):
    return ", ".join(f"{key}={value}" for key, value in settings.items())
