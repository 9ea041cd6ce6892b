"""The same kernels under other people's decoders: their blocks keep their parameters and are computed by the ops.

An accelerated block's class becomes a subclass of its own, of the same name, whose forward runs the ops. So parameters,
``state_dict``, hooks on the block, copies, replicas and pickles are what they were.
"""

from __future__ import annotations

import contextlib
import copy as copying
import functools
import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from refinenet_fast import blocks
from refinenet_fast.adapters import ADAPTERS, Adapter, Plain, is_plain
from refinenet_fast.alterations import MARK, REPLACED, SETTINGS
from refinenet_fast.backends import use_backend
from refinenet_fast.ops import _check

Model = TypeVar("Model", bound=nn.Module)
OWN = (blocks.RefineNetBlock, blocks.ResidualConvUnit, blocks.ResidualConvUnits, blocks.ChainedResidualPooling,
       blocks.MultiResolutionFusion, blocks.Convolution)  # fmt: skip
# Standard deviations of a trial's images: an activation that is smooth about zero, or has a ceiling, is to show it.
SPREADS = (0.1, 1.0, 30.0, 1e4)
TOLERANCE = 1e-4  # of a trial in float32, relative to the largest value


@dataclass(frozen=True)
class Explanation:
    """One row of :func:`explain`.

    Attributes:
        name: The block, as ``named_modules`` calls it.
        kind: Its class.
        op: What runs in its place; None where it has been left alone.
        reason: Why it has been left alone, or why, replaced, it runs its own forward as things are now; else None.
        note: What a block that is computed by the ops no longer does; None where there is nothing of the kind.
    """

    name: str
    kind: str
    op: str | None
    reason: str | None
    note: str | None = None


def accelerate(model: Model, *, copy: bool = False) -> Model:
    """Let the ops compute the residual conv units, fusion blocks and 3x3 convolutions of a decoder.

    Recognised are the blocks of DPT, MiDaS, Depth Anything, ZoeDepth, Depth Pro, CroCo and DUSt3R, VGGT (those of
    Hugging Face, of segmentation_models_pytorch, the original ones, and these copied elsewhere) and of RefineNet's
    published ports: by the names of their classes or of their parts, then by a trial on a small input, in which a copy
    of the block with random weights has to give what the ops give. Where a block has been replaced, the model's other
    3x3 convolutions of stride 1 follow.

    Parameters stay where they are: ``state_dict`` is unchanged, training goes on, autocast and ``torch.compile`` (after
    this call) work. Batch norm is folded in eval, anew at each call. The block's own forward runs in training with
    batch norm, where hooks sit on its children, where its activation or another part has been changed since, under
    ``torch.func``, forward-mode derivatives and ``torch.jit.trace``, and for arguments that are not those of the ops
    (Prompt Depth Anything's fusions: for a prompt). Gradients of gradients raise, as does ``torch.jit.script``:
    :func:`restore` the model before. Results are in ``channels_last`` memory. A block whose ReLU works in place no
    longer overwrites its input: who reads that again after the block, and counts on ReLU, gets another result
    (:func:`explain` notes these blocks).

    Args:
        model: Any module; changed in place, unless
        copy: a deep copy is asked for.

    Returns:
        The model, or its copy. Blocks that are accelerated already are left as they are.

    Warns:
        UserWarning: Nothing was found to replace; says what was looked for.

    Raises:
        TypeError: ``model`` is no module, or ``copy`` no bool; says what came.
    """
    _check_module(model)
    if _check.flag(copy, "copy"):
        model = copying.deepcopy(model)
    places = _places(model)
    for place in places:
        if not place.plain and _adapter(place.module) is None:
            _replace(place.module, _chosen(place)[0])
    if any(_adapter(place.module) for place in places):
        for place in places:
            free = place.plain and place.obstacle is None and not any(map(_adapter, place.blocks))
            if free and _adapter(place.module) is None:
                _replace(place.module, Plain())
    else:
        warnings.warn(_nothing(model, places), stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: every block has its own class and forward again. Returns the model.

    Raises:
        TypeError: ``model`` is no module; says what came.
    """
    _check_module(model)
    for module in model.modules():
        kind = type(module)
        module.__dict__.pop(SETTINGS, None)
        if MARK in vars(kind):
            module.__class__ = kind.__base__
        elif _adapter(module) is not None:  # parametrized since: its class, which copies share, is derived from ours
            bases = tuple(base.__base__ if MARK in vars(base) else base for base in kind.__bases__)
            members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, bases, members)
    return model


def explain(model: nn.Module) -> list[Explanation]:
    """Block by block: what :func:`accelerate` has replaced; what it leaves alone, or would, and why.

    Raises:
        TypeError: ``model`` is no module; says what came.
    """
    _check_module(model)
    places = _places(model)
    refusals = {place.module: _refusal(place) for place in places}
    rows = []
    for place in places:
        if place.plain and any(refusals[block] is None for block in place.blocks):
            continue  # a part of theirs
        adapter = _adapter(place.module)
        op = None if adapter is None else adapter.op
        reason = (refusals[place.module] or "not accelerated") if adapter is None else adapter.hindrance(place.module)
        note = None if adapter is None or reason is not None else adapter.note(place.module)
        rows.append(Explanation(place.name, type(place.module).__name__, op, reason, note))
    return rows


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


class _Place(NamedTuple):
    """What could be replaced: a block by its name or parts, or a plain convolution, which may be inside of one."""

    name: str
    module: nn.Module
    plain: bool
    obstacle: str | None  # why it must not be replaced
    blocks: tuple[nn.Module, ...]  # those around it


def _places(model: nn.Module) -> list[_Place]:
    """In the order of the model, but a block's own blocks before it."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module, blocks: tuple[nn.Module, ...], compiled: bool) -> Iterator[_Place]:
        if module in seen or isinstance(module, OWN):
            return
        seen.add(module)
        compiled |= "_orig_mod" in module._modules or module._compiled_call_impl is not None
        block = _is_block(module)
        around = (*blocks, module) if block else blocks
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, around, compiled)
        if block or _is_convolution(module):
            yield _Place(name, module, not block, _obstacle(module, compiled), blocks)

    return list(walk("", model, (), False))


def _is_block(module: nn.Module) -> bool:
    """Whether its name or its parts are a block's, or were, when it was replaced."""
    adapter = _adapter(module)
    return bool(_candidates(module)) if adapter is None else not isinstance(adapter, Plain)


def _is_convolution(module: nn.Module) -> bool:
    if isinstance(_adapter(module), Plain):
        return True
    return type(module) is nn.Conv2d and is_plain(module) and module.kernel_size == (3, 3)


def _obstacle(module: nn.Module, compiled: bool) -> str | None:
    if compiled:
        return "compiled: accelerate the model before compiling it"
    if "forward" in vars(module):
        return "its forward has been replaced already, by something else"
    return None


def _candidates(module: nn.Module) -> list[Adapter]:
    """Adapters of blocks with this class's name, then of those with these parts."""
    named = [adapter for pattern, adapter in ADAPTERS if fnmatchcase(type(module).__name__, pattern)]
    holders = {name.rpartition(".")[0] for name, _ in module.named_parameters(remove_duplicate=False)}
    return list(dict.fromkeys([*named, *(adapter for _, adapter in ADAPTERS if adapter.resembles(module, holders))]))


def _adapter(module: nn.Module) -> Adapter | None:
    """That of an accelerated block."""
    return getattr(type(module), MARK, None)


def _refusal(place: _Place) -> str | None:
    """Why it is left alone, or would be; None where it has been replaced, or would be."""
    if _adapter(place.module) is not None:
        return None
    return place.obstacle if place.plain else _chosen(place)[1]


def _chosen(place: _Place) -> tuple[Adapter | None, str | None]:
    """The first adapter that stands the block's trial, or why none does."""
    if place.obstacle is not None:
        return None, place.obstacle
    reasons = []
    for adapter in _candidates(place.module):
        reason = _trial(adapter, place.module)
        if reason is None:
            return adapter, None
        reasons.append(reason)
    return None, reasons[0]


def _trial(adapter: Adapter, block: nn.Module) -> str | None:
    """Why the ops do not compute what the block computes, for a copy with random weights; None if they do."""
    with torch.device("cpu"), _generators_kept(), use_backend("auto"):
        try:
            twin = _twin(block)
        except Exception as error:  # whatever another library's module raises when it is copied
            return f"it cannot be copied for a trial: {error}"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                return _eval_and_training(adapter, twin)
            except Exception as error:  # whatever a block of another meaning has in the places of a block's parts
                return f"the ops cannot run its parts: {error}"


def _eval_and_training(adapter: Adapter, twin: nn.Module) -> str | None:
    """Of training all but batch norm, in which the ops are not used."""
    for training in (False, True):
        for module in twin.modules():
            module.training = training and not isinstance(module, _BatchNorm)
        reason = adapter.hindrance(twin) or _calls(adapter, twin)
        if reason is not None:
            return f"in training, {reason}" if training else reason
    return _tensors_held(adapter, twin)


def _tensors_held(adapter: Adapter, twin: nn.Module) -> str | None:
    """Whether a module beside the parts has tensors whose changes in place nothing would show afterwards."""
    parts = set(adapter.parts(twin))
    for name, module in twin.named_modules():
        for attribute, value in vars(module).items() if module not in parts else ():
            if isinstance(value, Tensor):
                which = f"{name}.{attribute}" if name else attribute
                return f"it holds a tensor that is neither a parameter nor a buffer, {which!r}"
    return None


def _calls(adapter: Adapter, twin: nn.Module) -> str | None:
    """One after another, those that the block itself takes: not every one does without a skip, or with one."""
    tried, failure = 0, None
    for args, kwargs in adapter.trials(twin, _Normal(*SPREADS)):
        before = _generators()
        try:  # whatever a block of another meaning raises
            want = type(twin).forward(twin, *map(torch.clone, args), **kwargs)
        except Exception as error:
            failure = error
            continue
        if _generators() != before:  # what it drew may have left this result as it would have been without
            return "it draws random numbers"
        tried += 1
        got = adapter.fused(twin, *args, **kwargs) if adapter.takes(twin, *args, **kwargs) else None
        off = _difference(got, want)
        if not off <= TOLERANCE:
            return f"on a small input its result is not that of {adapter.op}: it differs by {off:.1e} of the largest"
    return None if tried else f"its own forward failed on small inputs: {failure}"


def _generators() -> tuple[Any, ...]:
    """The states of those that a module on the CPU may draw from: Python's, NumPy's, PyTorch's."""
    numpys: Any = np.random.get_state()
    return random.getstate(), numpys[1].tobytes(), numpys[2:], torch.get_rng_state().numpy().tobytes()


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """What is drawn inside takes no step of them."""
    python, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)


def _twin(block: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, its parameters and statistics random; without hooks, which may hold anything."""
    hooks = {id(value): type(value)() for m in block.modules() for k, value in vars(m).items() if k.endswith("_hooks")}
    twin = copying.deepcopy(block, hooks).to_empty(device="cpu").float()
    data = _Normal()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(data(*p.shape) / math.sqrt(max(1, p[0].numel()) if p.dim() > 1 else 1))
        for b in twin.buffers():
            b.copy_((data(*b.shape).abs() + 0.5) if b.is_floating_point() else torch.zeros_like(b))
    return twin


class _Normal:
    """Normal values, the same in every process, without a step of PyTorch's own generator.

    Args:
        spreads: Standard deviations of the entries of the first dimension, in turn; none for 1.
    """

    def __init__(self, *spreads: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.spreads = spreads

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        for i, spread in enumerate(self.spreads):
            values[i :: len(self.spreads)] *= spread
        return values


def _difference(got: Any, want: Any) -> float:
    """Largest difference in an image, relative to its largest value; inf where these are no maps of one shape."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or got.shape != want.shape:
        return math.inf
    return float(((got - want).abs().flatten(1).amax(1) / want.abs().flatten(1).amax(1)).max())


def _replace(module: nn.Module, adapter: Adapter | None) -> None:
    if adapter is not None:
        kind: Any = type(module)
        module.__dict__[SETTINGS] = adapter.settings(module)
        module.__class__ = _accelerated(kind, kind.forward, adapter)


@functools.cache
def _accelerated(kind: Any, own: Any, adapter: Adapter) -> type[nn.Module]:
    """The subclass of a block's class, whose forward is ``own``, with the adapter's."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in parameters}

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        maps, options = _in_order(names, args, kwargs)
        options = {k: given for k, given in options.items() if k not in defaults or given is not defaults[k]}
        return adapter.forward(self, functools.partial(kind.forward, self, *args, **kwargs), *maps, **options)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, args, *rest = kind.__reduce_ex__(self, max(2, protocol))
        if rest and rest[0] is not None:
            return _blank, (kind, adapter), rest[0]  # a pickle names the block's own class
        return _made, (kind if make is type(self) else make, args, adapter)  # which is made anew from its arguments

    def __prepare_scriptable__(self: nn.Module) -> None:  # which torch.jit.script calls first
        raise RuntimeError(
            f"torch.jit.script: expected a model that is not accelerated, found an accelerated {kind.__name__};"
            " call refinenet_fast.restore(model) before"
        )

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    methods = {f.__name__: f for f in (__reduce_ex__, __prepare_scriptable__)}
    return type(kind.__name__, (kind,), {**named, **methods, MARK: adapter, REPLACED: (kind, own), "forward": forward})


def _in_order(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call as adapters take them: maps by position, the size by name, however they were given."""
    options = {**dict(zip(names, args)), **kwargs}
    maps = args[len(names) :]
    for name in names:
        if name == "size" or name not in options:
            break
        maps = (*maps, options.pop(name))
    return maps, options


def _blank(kind: Any, adapter: Adapter) -> nn.Module:
    accelerated = _accelerated(kind, kind.forward, adapter)
    return accelerated.__new__(accelerated)


def _made(make: Callable[..., nn.Module], args: tuple[Any, ...], adapter: Adapter) -> nn.Module:
    module = make(*args)
    _replace(module, adapter)
    return module


def _nothing(model: nn.Module, places: list[_Place]) -> str:
    wanted = ", ".join(dict.fromkeys(pattern for pattern, _ in ADAPTERS))
    found = sum(not place.plain for place in places)
    outcome = (
        f"all of the {found} found in {type(model).__name__} are left alone; refinenet_fast.explain(model) says why"
        if found
        else f"found none in {type(model).__name__}"
    )
    return f"accelerate: expected blocks whose classes are named {wanted}, or that have their parts; {outcome}"
