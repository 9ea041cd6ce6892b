"""The table of opcodes, by family, with the section of "PTX ISA 9.0" that defines each.

Two sorts of entries: what *computes* takes the modifiers and the operands' numbers, one array over lanes each, and
gives the result's numbers; what *executes* takes the instruction, the lanes and the active ones among them, changes
registers, memory and barriers itself, and may return a ``Wait``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulator.parser import Instruction
from emulator.registers import Active, Lanes, Wait
from emulator.types import STORAGE

Compute = Callable[..., np.ndarray]
Execute = Callable[[Instruction, Lanes, Active], Wait | None]


@dataclass(frozen=True)
class Opcode:
    """``forms``: what the modifiers have to contain for this entry, the longest match wins."""

    section: str
    compute: Compute | None = None
    execute: Execute | None = None
    blocks: bool = False  # may wait, or needs whole warps: a basic block of its own
    whole: int = 0  # lanes that have to run it together: 32, a warp; 128, a warpgroup


TABLE: dict[str, Opcode] = {}


def computes(name: str, section: str) -> Callable[[Compute], Compute]:
    def enter(function: Compute) -> Compute:
        TABLE[name] = Opcode(section, compute=function)
        return function

    return enter


def simple(name: str, section: str, function: Callable[..., np.ndarray]) -> None:
    """What computes and has no use for modifiers."""
    TABLE[name] = Opcode(section, compute=lambda modifiers, *operands: function(*operands))


def executes(*names: str, section: str, blocks: bool = False, whole: int = 0) -> Callable[[Execute], Execute]:
    """Names may be an opcode with its first modifiers: "mbarrier.init", "cp.async.bulk.tensor"."""

    def enter(function: Execute) -> Execute:
        for name in names:
            TABLE[name] = Opcode(section, execute=function, blocks=blocks or whole > 0, whole=whole)
        return function

    return enter


# Modifiers that make another instruction of one that is known.
UNKNOWN = {"pack", "xorsign", "seq", "noComplete", "im2col", "scatter4", "gather4"}


def look_up(at: Instruction) -> Opcode | None:
    """The entry of the longest prefix of an instruction's name; None: it is not known."""
    parts = [at.opcode, *at.modifiers]
    if UNKNOWN & set(parts) or (at.opcode in ("mad", "madc") and "cc" in parts):
        return None
    if at.opcode in ("atom", "red") and any(m in ("v2", "v4", "v8") for m in parts):
        return None
    for count in range(len(parts), 0, -1):
        if (found := TABLE.get(".".join(parts[:count]))) is not None:
            known = found.compute is None or at.opcode == "prmt" or at.kind in STORAGE
            return found if known else None
    return None
