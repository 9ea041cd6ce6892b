"""Which backend runs: forced, or chosen by a pure function of device and dtype; and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from refinenet_fast.backends.base import Backend
from refinenet_fast.backends.cpu import Cpu
from refinenet_fast.backends.cuda import Cuda
from refinenet_fast.backends.reference import Reference
from refinenet_fast.backends.triton import Triton

_BACKENDS: dict[str, Backend] = {b.name: b for b in (Reference(), Cpu(), Triton(), Cuda())}
# What `auto` tries on each device type, best first; `reference` follows, since it runs everything.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def known_backends() -> Iterator[str]:
    """The names that can be forced, ``auto`` among them."""
    yield "auto"
    yield from _BACKENDS


def _check_name(name: object, argument: str) -> str:
    if not isinstance(name, str) or name not in known_backends():
        raise ValueError(f"{argument}: expected one of {', '.join(known_backends())}, got {name!r}")
    return name


# A plain global: Dynamo guards on it, and refuses context variables.
_forced: str = _check_name(os.environ.get("REFINENET_FAST_BACKEND") or "auto", "REFINENET_FAST_BACKEND")


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`list_backends`.

    Attributes:
        name: What ``use_backend`` takes.
        available: Whether it can run at all on this machine.
        reason: Why it is not available, or why ``auto`` does not pick it; None where there is nothing to say.
        proven: Whether its kernels have been executed and found right; ``auto`` picks no other.
        limits: "Which shapes: what runs them" for those that its fastest loop cannot take.
    """

    name: str
    available: bool
    reason: str | None
    proven: bool
    limits: tuple[str, ...] = ()


def list_backends() -> list[BackendInfo]:
    """Every backend with whether it can run here and, if not, why."""
    rows = []
    for backend in _BACKENDS.values():
        reason = backend.unavailable()
        note = reason
        if reason is None and not backend.proven:
            note = "unproven: never executed on its device; `auto` does not pick it"
        rows.append(BackendInfo(backend.name, reason is None, note, backend.proven, backend.limits))
    return rows


def get(name: str) -> Backend:
    """The backend of that name, for calling its kernels directly.

    Raises:
        ValueError: No such backend; names those there are.
    """
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)}, got {name!r}")
    return _BACKENDS[name]


class use_backend:
    """Force one backend for every op called within the block: ``with refinenet_fast.use_backend("cpu"):``.

    It is global to the process, not to the thread. ``"auto"`` gives the choice back to the package.

    Raises:
        ValueError: Unknown name; lists the known ones.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name, "use_backend")
        self.before: list[str] = []

    def __enter__(self) -> None:
        global _forced
        self.before.append(_forced)
        _forced = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self.before.pop()


def resolve(
    op: str,
    x: Tensor,  # the activations the op will run on, after autocast
) -> str:
    """Name of the backend that runs ``op`` on ``x``.

    Raises:
        RuntimeError: A backend is forced and cannot run this; says why.
    """
    return _resolve(op, _forced, x.device.type, x.device.index, x.dtype)


def _resolve(op: str, forced: str, device_type: str, index: int | None, dtype: torch.dtype) -> str:
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    if forced != "auto":
        reason = _BACKENDS[forced].can_run(device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {forced!r} is forced and cannot run this: {reason}")
        return forced
    for name in _PREFERENCE.get(device_type, ()):
        backend = _BACKENDS[name]
        if backend.proven and backend.can_run(device, dtype) is None:
            return name
    return "reference"


# A constant to Dynamo: all it depends on is in its arguments, and what it asks (drivers, libraries) cannot be traced.
# This is what torch.compiler.assume_constant_result does, after importing Dynamo, which takes seconds.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forces_reference() -> bool:
    """Whether ``reference`` is forced, by ``use_backend`` or by the environment."""
    return _forced == "reference"
