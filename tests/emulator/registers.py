"""Threads that run together: their registers as vectors, what of them is defined, and what they wait for.

A register knows which lanes have written it. What is undefined may be moved and computed with, and must not become an
address, a stored value or a branch. A register that an asynchronous wgmma is still writing may only be moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emulator import types
from emulator.errors import Fault
from emulator.parser import Immediate, Kernel, Operand, Register

if TYPE_CHECKING:
    from emulator.unit import Unit

Bits = np.ndarray  # (L,) of a register's storage type


@dataclass(frozen=True)
class Active:
    """The lanes that an instruction runs for; ``full``: all that have not exited."""

    mask: np.ndarray  # (L,) bool
    full: bool


@dataclass(eq=False)
class Wait:
    """Why lanes stand still: ``wake`` runs for them once ``ready``; they go on after the instruction.

    ``again``: they and all who came with them have to execute it (again); ``rest``: those who came with them only.
    """

    mask: np.ndarray  # (L,) bool
    ready: Callable[[], bool]
    text: Callable[[], str]  # what for
    wake: Callable[[np.ndarray], None] | None = None
    again: bool = False
    rest: bool = False
    pc: int = 0


class Lanes:
    """``L`` threads of a unit, with one program counter each.

    Args:
        unit: The blocks that they belong to.
        threads: (L,) their numbers in the unit.
    """

    def __init__(self, kernel: Kernel, unit: Unit, threads: np.ndarray) -> None:
        self.kernel, self.unit, self.threads = kernel, unit, threads
        self.count = len(threads)
        self.special = {name: values[threads] for name, values in unit.special.items()}
        self.block = unit.block_of[threads]  # (L,) which of the unit's blocks
        self.grid_block = unit.grid_block[threads]  # (L,) of the grid's
        self.registers: dict[str, Bits] = dict(self.special)
        self.defined: dict[str, np.ndarray] = {}  # (L,) bool; absent: in all lanes
        self.pcs = np.zeros(self.count, np.int64)
        self.exited = np.zeros(self.count, bool)
        self.parked = np.zeros(self.count, bool)
        self.waits: list[Wait] = []
        self.flight: dict[str, int] = {}  # registers that wgmma is writing or reading -> its group
        self.inputs: set[str] = set()  # those of them that it only reads
        self.touched: set[str] = set()  # registers read or written since the last wgmma.fence
        self.live = self.count  # lanes that have not exited
        self.carry = np.zeros(self.count, bool)
        self.fenced = False  # by wgmma.fence
        self.steps = 0
        self.yielded = False  # asked for something that had not happened yet, and should let others run
        self.locals: np.ndarray | None = None  # (L, bytes) of local memory
        self.local_valid = np.zeros((0, 0), bool)  # (L, bytes) where it has been written
        self.vain = np.zeros(self.count, bool)  # lanes that have asked in vain since others ran

    def who(self, lane: int) -> str:
        block, thread = (
            tuple(int(self.special[f"%{name}.{axis}"][lane]) for axis in "xyz") for name in ("ctaid", "tid")
        )
        return f"block {block}, thread {thread}"

    def all_of(self, active: Active) -> np.ndarray:
        """(A,) the unit's numbers of the threads that an instruction runs for."""
        return self.threads[active.mask]

    # -- reading ----------------------------------------------------------------------------------------------------

    def bits(self, operand: Operand, kind: str) -> Bits:
        """(L,) of a register, () of an immediate."""
        if isinstance(operand, Immediate):
            return constant(operand.value, kind)
        assert isinstance(operand, Register), operand
        held = self.registers.get(operand.name)
        if held is None:
            held = self._first(operand.name)
        if self.flight and operand.name in self.flight:
            raise Fault(f"register {operand.name} is in flight: wgmma has not been waited for")
        if operand.name in self.kernel.multiplied:
            self.touched.add(operand.name)
        return ~held if operand.negated else held

    def _first(self, name: str) -> Bits:
        """A register's bits when it has not been written."""
        if name.startswith(("%clock", "%globaltimer")):
            return np.full(self.count, self.steps, np.uint64)
        held = np.zeros(self.count, types.STORAGE[self.kernel.type_of(name)])
        self.registers[name], self.defined[name] = held, np.zeros(self.count, bool)
        return held

    def columns(self, operands: Sequence[Operand], kind: str) -> Bits:
        """(R, L) of several operands."""
        found = [self.bits(operand, kind) for operand in operands]
        return np.array([bits if bits.ndim else np.full(self.count, bits) for bits in found])

    def number(self, operand: Operand, kind: str) -> np.ndarray:
        return types.from_bits(self.bits(operand, kind), kind)

    def undefined(self, operands: Iterable[Operand]) -> np.ndarray | None:
        """(L,) lanes in which any of the registers is undefined; None where there are none."""
        result = None
        if not self.defined:
            return None
        for operand in operands:
            defined = self.defined.get(operand.name) if isinstance(operand, Register) else None
            if defined is not None:
                result = ~defined if result is None else result | ~defined
        return result

    def need(self, operands: Iterable[Operand], active: Active, what: str) -> None:
        """
        Raises:
            Fault: One of the operands is undefined in a lane.
        """
        for operand in operands:
            if isinstance(operand, Register):
                self.bits(operand, "b64")
        undefined = self.undefined(operands)
        if undefined is not None and (undefined & active.mask).any():
            raise Fault(f"{what} is undefined", int(undefined[active.mask].argmax()))

    def uniform(self, operand: Operand, kind: str, active: Active, what: str) -> int:
        """A number that has to be the same in all lanes."""
        self.need([operand], active, what)
        values = np.broadcast_to(self.number(operand, kind), self.count)[active.mask]
        if (values != values[0]).any():
            raise Fault(f"{what} differs between lanes: {values[0]} and {values[values != values[0]][0]}")
        return int(values[0])

    # -- writing ----------------------------------------------------------------------------------------------------

    def write(self, to: Operand, bits: Bits, active: Active, undefined: np.ndarray | None = None) -> None:
        assert isinstance(to, Register), to
        name = to.name
        if name == "_":
            return
        if self.flight and name in self.flight:
            raise Fault(f"register {name} is in flight: wgmma has not been waited for")
        self.touched.add(name)
        storage = types.STORAGE[self.kernel.type_of(name)]
        if bits.ndim == 0:
            bits = np.full(self.count, bits)
        bits = bits.astype(storage, copy=False)
        if active.full:
            self.registers[name] = bits
            if undefined is not None:
                self.defined[name] = ~undefined
            elif self.defined:
                self.defined.pop(name, None)
            return
        held = self.registers.get(name)
        if held is None:
            held = self._first(name)
        self.registers[name] = np.where(active.mask, bits, held)
        defined = self.defined.get(name)
        if defined is not None or undefined is not None:
            before = np.ones(self.count, bool) if defined is None else defined
            now = np.ones(self.count, bool) if undefined is None else ~undefined
            merged = np.where(active.mask, now, before)
            self.defined[name] = merged
            if (merged | self.exited).all():
                del self.defined[name]

    # -- waiting ----------------------------------------------------------------------------------------------------

    def wake(self) -> bool:
        """Wake what can go on; whether any lane can run."""
        if self.waits:
            for wait in [w for w in self.waits if w.ready()]:
                self.waits.remove(wait)
                self.parked &= ~wait.mask
                if wait.wake is not None:
                    wait.wake(wait.mask)
        return bool((~self.parked & ~self.exited).any())

    @property
    def done(self) -> bool:
        return bool(self.exited.all())


def constant(value: int | float, kind: str) -> Bits:
    """() an immediate's bits."""
    if kind == "pred":
        return np.array(bool(value))
    if kind in types.PACKED:
        kind = f"b{8 * types.width(kind)}"
    if isinstance(value, float):  # of types that are only bits, the floating-point number of that width is meant
        return types.to_bits(np.array(value), kind if kind in types.FLOATS else f"f{8 * types.width(kind)}")
    return np.array(value & ((1 << 8 * types.width(kind)) - 1)).astype(types.STORAGE[kind])
