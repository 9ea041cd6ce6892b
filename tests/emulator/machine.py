"""Runs a kernel's instructions over groups of lanes that share a vector of registers.

Every lane has a program counter. The group runs the basic block at the smallest one, for the lanes that are there, so
that diverged lanes meet again where their paths join. A register knows which lanes have written it; what is undefined
may be moved and computed with, and must not become an address, a stored value or a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from emulator import arithmetic, types
from emulator.errors import EmulatorError
from emulator.memory import GlobalMemory
from emulator.parser import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector

Bits = np.ndarray  # (L,) of a register's storage type
SPECIAL = ("tid", "ntid", "ctaid", "nctaid")
BRANCHES = ("bra", "ret", "exit")


@dataclass
class Lanes:
    """Threads that run together, perhaps of several blocks."""

    special: dict[str, np.ndarray]  # "%tid.x" -> (L,) uint32
    registers: dict[str, Bits] = field(default_factory=dict)
    defined: dict[str, np.ndarray] = field(default_factory=dict)  # (L,) bool; absent: in all lanes

    @property
    def count(self) -> int:
        return len(self.special["%tid.x"])

    def who(self, lane: int) -> str:
        block, thread = (
            tuple(int(self.special[f"%{name}.{axis}"][lane]) for axis in "xyz") for name in ("ctaid", "tid")
        )
        return f"block {block}, thread {thread}"


class Machine:
    """One kernel, ready to run.

    Raises:
        EmulatorError: At ``run``, for what a kernel must not do, and for an opcode that is not known.
    """

    def __init__(self, kernel: Kernel, parameters: bytes, memory: GlobalMemory) -> None:
        if len(parameters) != kernel.parameter_bytes:
            raise EmulatorError(
                f"{kernel.name}: expected {kernel.parameter_bytes} bytes of parameters, got {len(parameters)}"
            )
        self.kernel, self.memory = kernel, memory
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.steps = [self._step(instruction) for instruction in kernel.instructions]
        starts = {0, *kernel.labels.values()}
        starts |= {i + 1 for i, at in enumerate(kernel.instructions) if at.opcode in BRANCHES}
        self.starts = sorted(s for s in starts if s < len(self.steps))

    @staticmethod
    def unknown(kernel: Kernel) -> set[str]:
        """Opcodes that would raise if they were executed."""
        own = {name.removeprefix("_run_") for name in dir(Machine) if name.startswith("_run_")}
        return {i.name for i in kernel.instructions if i.opcode not in own | set(arithmetic.TABLE) | set(BRANCHES)}

    def run(self, lanes: Lanes, budget: int) -> int:
        """To the end of all lanes; returns the basic blocks that were run."""
        pcs, end, done = np.zeros(lanes.count, np.int64), len(self.steps), 0
        blocks = {start: stop for start, stop in zip(self.starts, [*self.starts[1:], end], strict=True)}
        while True:
            pc = int(pcs.min())
            if pc >= end:
                return done
            mask, stop, done = pcs == pc, blocks[pc], done + 1
            if done > budget:
                where = self._where(self.kernel.instructions[pc])
                raise EmulatorError(f"{where}: more than {budget} basic blocks: {lanes.who(int(mask.argmax()))} loops")
            for index in range(pc, stop):
                if self.kernel.instructions[index].opcode in BRANCHES:
                    break
                self.steps[index](lanes, mask)
            else:
                pcs[mask] = stop
                continue
            self._branch(self.kernel.instructions[index], lanes, mask, pcs, index)

    def _branch(self, at: Instruction, lanes: Lanes, mask: np.ndarray, pcs: np.ndarray, index: int) -> None:
        taken = self._guarded(at, lanes, mask)
        pcs[mask] = index + 1
        if at.opcode == "bra":
            target = at.operands[-1]
            assert isinstance(target, Symbol)
            pcs[taken] = self.kernel.labels[target.name]
        else:
            pcs[taken] = len(self.steps)

    # -- reading and writing registers ------------------------------------------------------------------------------

    def _where(self, at: Instruction) -> str:
        name = self.kernel.name if len(self.kernel.name) < 60 else "..." + self.kernel.name[-57:]
        return f"{name}, {at.source or 'source unknown'}, PTX line {at.line}, {at.name}"

    def _guarded(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> np.ndarray:
        if at.guard is None:
            return mask
        holds = self._bits(at.guard, "pred", lanes)
        self._need(at, [at.guard], lanes, mask, "the predicate")
        return mask & (~holds if at.negated else holds)

    def _bits(self, operand: Operand, kind: str, lanes: Lanes) -> Bits:
        if isinstance(operand, Immediate):
            return _constant(operand.value, kind)
        assert isinstance(operand, Register)
        if operand.name in lanes.special:
            return lanes.special[operand.name]
        held = lanes.registers.get(operand.name)
        if held is None:
            held = np.zeros(lanes.count, types.STORAGE[self.kernel.type_of(operand.name)])
            lanes.registers[operand.name] = held
            lanes.defined[operand.name] = np.zeros(lanes.count, bool)
        return held

    def _number(self, operand: Operand, kind: str, lanes: Lanes) -> np.ndarray:
        return types.from_bits(self._bits(operand, kind, lanes), kind)

    def _undefined(self, operands: list[Operand], lanes: Lanes) -> np.ndarray | None:
        """Lanes in which any of the registers is undefined; None where there are none."""
        result = None
        for operand in operands:
            defined = lanes.defined.get(operand.name) if isinstance(operand, Register) else None
            if defined is not None:
                result = ~defined if result is None else result | ~defined
        return result

    def _need(self, at: Instruction, operands: list[Operand], lanes: Lanes, mask: np.ndarray, what: str) -> None:
        for operand in operands:
            self._bits(operand, "b64", lanes) if isinstance(operand, Register) else None
        undefined = self._undefined(operands, lanes)
        if undefined is not None and (undefined & mask).any():
            lane = int((undefined & mask).argmax())
            raise EmulatorError(f"{self._where(at)}: {what} is undefined in {lanes.who(lane)}")

    def _write(self, to: Register, bits: Bits, lanes: Lanes, mask: np.ndarray, undefined: np.ndarray | None) -> None:
        if to.name == "_":
            return
        storage = types.STORAGE[self.kernel.type_of(to.name)]
        bits = np.broadcast_to(bits, lanes.count).astype(storage, copy=False)
        if mask.all():
            lanes.registers[to.name] = bits
            lanes.defined.pop(to.name, None)
            if undefined is not None:
                lanes.defined[to.name] = ~undefined
            return
        held = self._bits(to, "b64", lanes)
        lanes.registers[to.name] = np.where(mask, bits, held)
        defined = lanes.defined.get(to.name)
        if defined is not None or undefined is not None:
            before = np.ones(lanes.count, bool) if defined is None else defined
            now = np.ones(lanes.count, bool) if undefined is None else ~undefined
            merged = np.where(mask, now, before)
            lanes.defined[to.name] = merged
            if merged.all():
                del lanes.defined[to.name]

    # -- instructions -----------------------------------------------------------------------------------------------

    def _step(self, at: Instruction) -> Callable[[Lanes, np.ndarray], None]:
        """What runs this instruction for the lanes of a mask."""
        special = getattr(self, f"_run_{at.opcode}", None)
        if special is None and at.opcode in arithmetic.TABLE:
            special = self._run_arithmetic
        if special is None and at.opcode not in BRANCHES:
            special = self._refuse

        def step(lanes: Lanes, mask: np.ndarray) -> None:
            chosen = self._guarded(at, lanes, mask)
            if special is not None and chosen.any():
                with np.errstate(all="ignore"):
                    special(at, lanes, chosen)

        return step

    def _refuse(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        raise EmulatorError(f"{self._where(at)}: this opcode is not known")

    def _run_arithmetic(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        compute = arithmetic.TABLE[at.opcode][1]
        kind = at.modifiers[-1]
        to, *sources = at.operands
        kinds = [kind] * len(sources)
        if at.opcode in ("shl", "shr", "bfe"):
            kinds[1:] = ["u32"] * len(kinds[1:])
        elif at.opcode == "selp" or (at.opcode == "setp" and len(sources) == 3):
            kinds[2] = "pred"
        numbers = [self._number(s, k, lanes) for s, k in zip(sources, kinds, strict=True)]
        result = compute(at.modifiers, *numbers)
        out = "pred" if at.opcode == "setp" else kind
        if "wide" in at.modifiers:
            out = kind[0] + str(2 * int(kind[1:]))
        assert isinstance(to, Register)
        self._write(to, types.to_bits(result, out), lanes, mask, self._undefined(sources, lanes))

    def _run_mov(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        """9.7.9; of a vector the elements come from the lowest bits on."""
        to, source = at.operands
        if isinstance(source, Vector):
            part = 8 * types.width(at.modifiers[-1]) // len(source.elements)
            total = np.zeros(lanes.count, np.uint64)
            for k, element in enumerate(source.elements):
                total |= self._bits(element, f"b{part}", lanes).astype(np.uint64) << np.uint64(k * part)
            assert isinstance(to, Register)
            self._write(to, total, lanes, mask, self._undefined(list(source.elements), lanes))
        elif isinstance(to, Vector):
            part = 8 * types.width(at.modifiers[-1]) // len(to.elements)
            bits = self._bits(source, at.modifiers[-1], lanes).astype(np.uint64)
            for k, element in enumerate(to.elements):
                assert isinstance(element, Register)
                piece = bits >> np.uint64(k * part) & np.uint64((1 << part) - 1)
                self._write(element, piece, lanes, mask, self._undefined([source], lanes))
        else:
            self._run_arithmetic(at, lanes, mask)

    def _run_cvt(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        """9.7.9: integer to integer wraps, float to integer rounds as told and saturates."""
        to_kind, from_kind = at.modifiers[-2:]
        to, source = at.operands
        value = self._number(source, from_kind, lanes)
        if to_kind[0] in "us" and value.dtype.kind == "f":
            rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
            (how,) = (rounding[m] for m in at.modifiers if m in rounding)
            limits = np.iinfo(types.ARITHMETIC[to_kind])
            value = np.clip(np.nan_to_num(how(value.astype(np.float64)), nan=0.0), limits.min, limits.max)
        assert isinstance(to, Register)
        self._write(to, types.to_bits(value, to_kind), lanes, mask, self._undefined([source], lanes))

    def _run_ld(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        """9.7.9."""
        kind, count = at.modifiers[-1], _count(at)
        size = types.width(kind) * count
        to, address = at.operands
        assert isinstance(address, Address)
        targets = to.elements if isinstance(to, Vector) else (to,)
        if "param" in at.modifiers:
            offset, length = self.kernel.parameters[str(address.base)]
            if address.offset + size > length:
                raise EmulatorError(f"{self._where(at)}: reads past the parameter's {length} bytes")
            first = offset + address.offset
            raw = np.broadcast_to(self.parameters[first : first + size], (lanes.count, size))
        else:
            self._only_global(at)
            raw = np.zeros((lanes.count, size), np.uint8)
            raw[mask] = self.memory.load(self._addresses(at, address, lanes, mask), size, self._where(at))
        for k, target in enumerate(targets):
            part = np.ascontiguousarray(raw[:, k * types.width(kind) : (k + 1) * types.width(kind)])
            number = part.view(types.ARITHMETIC[kind] if kind[0] == "s" else types.STORAGE[kind])[:, 0]
            assert isinstance(target, Register)
            storage = types.STORAGE[self.kernel.type_of(target.name)]
            self._write(target, number.astype(storage), lanes, mask, None)

    def _run_st(self, at: Instruction, lanes: Lanes, mask: np.ndarray) -> None:
        """9.7.9."""
        kind, size = at.modifiers[-1], types.width(at.modifiers[-1])
        address, value = at.operands
        assert isinstance(address, Address)
        self._only_global(at)
        sources = list(value.elements) if isinstance(value, Vector) else [value]
        self._need(at, sources, lanes, mask, "the stored value")
        parts = []
        for source in sources:
            bits = np.broadcast_to(self._bits(source, kind, lanes), lanes.count).astype(types.STORAGE[kind])
            parts.append(np.ascontiguousarray(bits)[:, None].view(np.uint8).reshape(lanes.count, size))
        values = np.concatenate(parts, axis=1)[mask]
        self.memory.store(self._addresses(at, address, lanes, mask), values, self._where(at))

    def _only_global(self, at: Instruction) -> None:
        if "global" not in at.modifiers:
            raise EmulatorError(f"{self._where(at)}: only global memory and parameters are known")

    def _addresses(self, at: Instruction, address: Address, lanes: Lanes, mask: np.ndarray) -> np.ndarray:
        assert isinstance(address.base, Register)
        self._need(at, [address.base], lanes, mask, "the address")
        return self._number(address.base, "s64", lanes)[mask] + address.offset


def _count(at: Instruction) -> int:
    return {"v2": 2, "v4": 4, "v8": 8}.get(at.modifiers[-2], 1) if len(at.modifiers) > 1 else 1


def _constant(value: int | float, kind: str) -> Bits:
    if kind == "pred":
        return np.array(bool(value))
    if isinstance(value, float):
        return types.to_bits(np.array(value), kind)
    return np.array(value & ((1 << 8 * types.width(kind)) - 1)).astype(types.STORAGE[kind])
