"""The compiled core ``refinenet_fast._C``, or the reason it is missing."""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch  # first: its OpenMP runtime is the one that _C then shares
from torch import Tensor

_C: ModuleType | None
missing: str | None
try:
    _C, missing = importlib.import_module("refinenet_fast._C"), None
except ImportError as error:
    _C, missing = None, f"the compiled core refinenet_fast._C cannot be imported ({error}); run `pip install -e .`"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/arguments.h


def build_info() -> dict[str, Any]:
    """What was built into this installation, for which architectures, and what was left out and why.

    Returns:
        A dict with ``version``, ``cxx_compiler``, ``build_type``, ``openmp``, ``cpu_isas`` and ``cuda`` (``built``,
        ``compiler``, ``version``, ``archs``, ``reason``); and ``cpu_isa``, the instruction set in use on this machine.

    Raises:
        RuntimeError: The compiled core is missing.
    """
    if _C is None:
        raise RuntimeError(missing)
    return {**_built(), "cpu_isa": _C.cpu_isa()}


@cache
def _built() -> dict[str, Any]:
    return json.loads(_C.build_info_json())


def pointer(t: Tensor | None) -> int:
    """Address of the first element; 0 for None.

    Raises:
        RuntimeError: The tensor has elements but no memory.
    """
    if t is None:
        return 0
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise RuntimeError(f"expected a tensor with memory of its own, got one of shape {tuple(t.shape)} without")
    return address


def _force_isa_from_environment() -> None:
    wanted = os.environ.get("REFINENET_FAST_CPU_ISA")
    if wanted and _C is not None:
        try:
            _C.cpu_set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"REFINENET_FAST_CPU_ISA: {error}") from None


_force_isa_from_environment()
