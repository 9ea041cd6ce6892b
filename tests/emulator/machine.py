"""Control flow: runs a kernel's instructions over groups of lanes.

Every lane has a program counter. A group runs the basic block at the smallest one, for the lanes that are there, so
that diverged lanes meet again where their paths join. Lanes that wait are parked and the others run on.
"""

from __future__ import annotations

import numpy as np

from emulator.errors import EmulatorError, Fault
from emulator.memory import SHARED_FIRST, GlobalMemory
from emulator.parser import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol
from emulator.prepare import prepared
from emulator.registers import Active, Lanes
from emulator.table import look_up

BRANCHES = ("bra", "ret", "exit", "brx")


class Machine:
    """One kernel, ready to run.

    Args:
        shared: Bytes of dynamic shared memory.

    Raises:
        EmulatorError: At ``run``, for what a kernel must not do, and for an opcode that is not known.
    """

    def __init__(self, kernel: Kernel, memory: GlobalMemory, shared: int = 0, budget: int = 1_000_000) -> None:
        self.kernel, self.budget = kernel, budget
        self.variables, self.shared_bytes, self.local_bytes = _place(kernel, memory, shared)
        self.entries = [look_up(at) for at in kernel.instructions]
        pairs = zip(kernel.instructions, self.entries, strict=True)
        self.steps = [None if at.opcode in BRANCHES else prepared(self._resolved(at), e, kernel) for at, e in pairs]
        self.guards = [at.guard for at in kernel.instructions]
        self.end = len(self.steps)
        starts = {0, self.end, *kernel.labels.values()}
        for i, (at, entry) in enumerate(zip(kernel.instructions, self.entries, strict=True)):
            if at.opcode in BRANCHES:
                starts.add(i + 1)
            elif entry is not None and entry.blocks:
                starts |= {i, i + 1}
        self.starts = np.array(sorted(starts))

    @staticmethod
    def unknown(kernel: Kernel) -> set[str]:
        """Opcodes that would raise if they were executed."""
        return {i.name for i in kernel.instructions if i.opcode not in BRANCHES and look_up(i) is None}

    def uses(self, *opcodes: str) -> bool:
        """Whether the kernel has any of these, told by the beginnings of their names."""
        return any(at.name.startswith(opcodes) for at in self.kernel.instructions)

    def talks(self) -> bool:
        """Whether blocks may order themselves, by atomics on global memory."""
        atomics = [at for at in self.kernel.instructions if at.opcode in ("atom", "red")]
        return any(not any(m.startswith("shared") for m in at.modifiers) for at in atomics)

    def meets(self) -> bool:
        """Whether threads can meet: in shared memory, or at anything that waits."""
        return self.shared_bytes > 0 or any(e is not None and e.blocks for e in self.entries)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, lanes: Lanes) -> None:
        """Until every lane has exited or waits, or has asked in vain and should let other groups go on."""
        lanes.vain[:] = False
        while lanes.wake():
            # Those that have asked in vain let the others run first, whatever their program counters.
            running = ~lanes.parked & ~lanes.exited
            patient = running & ~lanes.vain
            if not patient.any():
                lanes.yielded = True
                return
            pc = int(np.where(patient, lanes.pcs, self.end).min())
            mask = running & (lanes.pcs == pc)
            lanes.yielded = False
            self._go(lanes, Active(mask, bool((mask | lanes.exited).all())), pc)
            if lanes.yielded:
                lanes.vain |= mask
        lanes.yielded = False

    def _go(self, lanes: Lanes, active: Active, pc: int) -> None:
        """From ``pc`` on while the lanes stay together, to the end of the basic block where others may join them."""
        stop = self.end if active.full else int(self.starts[np.searchsorted(self.starts, pc, side="right")])
        shadow, steps, guards = lanes.unit.shadow, self.steps, self.guards
        index, chosen = pc, active
        self._count(lanes, active, pc)
        try:
            while index < stop:
                chosen, guard, step = active, guards[index], steps[index]
                if guard is not None:
                    chosen = _guarded(guard, lanes, active)
                if step is None:
                    following = self._branch(lanes, active, chosen, index)
                    if following is None or not active.full:
                        return
                    self._count(lanes, active, index)
                    index = following
                    continue
                if chosen is not None:
                    if shadow is not None:
                        shadow.place = index
                    wait = step(lanes, chosen)
                    if wait is not None:
                        wait.pc = index
                        lanes.pcs[active.mask] = index + 1
                        again = chosen.mask if wait.again else chosen.mask & ~wait.mask if wait.rest else ~active.mask
                        lanes.pcs[again & active.mask] = index
                        lanes.parked |= wait.mask
                        lanes.waits.append(wait)
                        return
                index += 1
                if lanes.yielded:
                    break
        except Fault as fault:
            raise EmulatorError(self._told(index, lanes, chosen, fault)) from None
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise EmulatorError(f"{self.where(index)}: not modelled: {type(error).__name__}: {error}") from error
        lanes.pcs[active.mask] = index

    def _count(self, lanes: Lanes, active: Active, index: int) -> None:
        lanes.steps += 1
        if lanes.steps > self.budget:
            who = lanes.who(int(active.mask.argmax()))
            raise EmulatorError(f"{self.where(index)}: more than {self.budget} basic blocks: {who} loops")

    def _branch(self, lanes: Lanes, active: Active, taken: Active | None, index: int) -> int | None:
        """Where all active lanes go on; None: they part, or end."""
        at = self.kernel.instructions[index]
        lanes.pcs[active.mask] = index + 1
        if taken is None:
            return index + 1
        if at.opcode == "bra":
            target = at.operands[-1]
            assert isinstance(target, Symbol)
            label = self._label(target.name)
            lanes.pcs[taken.mask] = label
            return label if taken is active else None
        if at.opcode == "brx":
            which, table = at.operands
            assert isinstance(table, Symbol)
            lanes.need([which], taken, "the branch's index")
            labels = np.array([self._label(name) for name in self.kernel.targets[table.name]])
            chosen = lanes.number(which, "u32")[taken.mask]
            if (chosen >= len(labels)).any():
                raise Fault(f"index {chosen.max()} of {len(labels)} targets", int(chosen.argmax()))
            lanes.pcs[taken.mask] = labels[chosen]
        else:
            if lanes.flight:
                raise Fault("exits while wgmma is in flight")
            lanes.exited |= taken.mask
            lanes.live = int((~lanes.exited).sum())
            lanes.pcs[taken.mask] = self.end
        return None

    def _label(self, name: str) -> int:
        if name not in self.kernel.labels:
            raise Fault(f"there is no label {name}")
        return self.kernel.labels[name]

    # -- saying where -------------------------------------------------------------------------------------------------

    def place(self, index: int) -> str:
        at = self.kernel.instructions[index]
        return f"{at.source or 'source unknown'}, PTX line {at.line}, {at.name}"

    def where(self, index: int) -> str:
        name = self.kernel.name if len(self.kernel.name) < 60 else "..." + self.kernel.name[-57:]
        return f"{name}, {self.place(index)}"

    def _told(self, index: int, lanes: Lanes, active: Active | None, fault: Fault) -> str:
        ids = np.flatnonzero((active or Active(~lanes.exited, True)).mask)
        lane = int(ids[min(fault.position or 0, len(ids) - 1)]) if len(ids) else 0
        others = "" if fault.position is not None or len(ids) < 2 else " and others"
        return f"{self.where(index)}: {fault} in {lanes.who(lane)}{others}"

    def _resolved(self, at: Instruction) -> Instruction:
        """With the addresses of variables in place of their names."""

        def resolve(operand: Operand) -> Operand:
            if isinstance(operand, Symbol) and operand.name in self.variables:
                return Immediate(self.variables[operand.name])
            if isinstance(operand, Symbol) and operand.name in self.kernel.parameters:
                return Immediate(self.kernel.parameters[operand.name][0])
            if isinstance(operand, Symbol) and operand.name == "WARP_SZ":
                return Immediate(32)
            if isinstance(operand, Address) and operand.base in self.variables:
                return Address(None, self.variables[str(operand.base)] + operand.offset, operand.coordinates)
            return operand

        fields = {**at.__dict__, "operands": tuple(resolve(o) for o in at.operands)}
        return Instruction(**fields)


def _place(kernel: Kernel, memory: GlobalMemory, dynamic: int) -> tuple[dict[str, int], int, int]:
    """Addresses of the variables in use, and the bytes of shared and of local memory.

    Dynamic shared memory comes last, and every variable without a size is the whole of it.
    """
    names = {
        o.name if isinstance(o, Symbol) else o.base
        for at in kernel.instructions
        for o in at.operands
        if isinstance(o, Symbol | Address)
    }
    addresses: dict[str, int] = {}
    used = {"shared": SHARED_FIRST, "local": 0}
    unsized = []
    for name, variable in kernel.variables.items():
        if name not in names:
            continue
        if variable.space not in used:
            data = np.zeros(max(variable.size, 1), np.uint8)
            data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            addresses[name] = memory.add(name, data)
        elif variable.size:
            addresses[name] = -(-used[variable.space] // variable.alignment) * variable.alignment
            used[variable.space] = addresses[name] + variable.size
        else:
            unsized.append(name)
    if unsized:
        first = -(-used["shared"] // 1024) * 1024
        addresses |= dict.fromkeys(unsized, first)
        used["shared"] = first
    used["shared"] += dynamic
    return addresses, used["shared"] - SHARED_FIRST, used["local"]


def _guarded(guard: Register, lanes: Lanes, active: Active) -> Active | None:
    """The active lanes in which the predicate holds."""
    holds = lanes.bits(guard, "pred")
    if guard.name in lanes.defined:
        lanes.need([guard], active, "the predicate")
    mask = active.mask & holds
    if mask.all():
        return active
    if not mask.any():
        return None
    return Active(mask, active.full and bool((mask | lanes.exited).all()))
