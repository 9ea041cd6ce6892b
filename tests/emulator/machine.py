"""Control flow: runs a kernel's instructions over groups of lanes.

Every lane has a program counter. A group runs the basic block at the smallest one, for the lanes that are there, so
that diverged lanes meet again where their paths join. Lanes that wait are parked and the others run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from emulator import types
from emulator.arithmetic import opposite
from emulator.errors import EmulatorError, Fault
from emulator.memory import SHARED_FIRST, GlobalMemory
from emulator.parser import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector
from emulator.registers import Active, Lanes, Wait
from emulator.table import Opcode, look_up

BRANCHES = ("bra", "ret", "exit", "brx")
Run = Callable[[Lanes, Active], Wait | None]


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
        self.steps = [self._step(*pair) for pair in zip(kernel.instructions, self.entries, strict=True)]
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

    def meets(self) -> bool:
        """Whether threads can meet: in shared memory, or at anything that waits."""
        return self.shared_bytes > 0 or any(e is not None and e.blocks for e in self.entries)

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, lanes: Lanes) -> None:
        """Until every lane has exited or waits, or has asked in vain and should let other groups go on."""
        lanes.yielded = False
        while lanes.wake() and not lanes.yielded:
            running = ~lanes.parked & ~lanes.exited
            pc = int(np.where(running, lanes.pcs, self.end).min())
            mask = running & (lanes.pcs == pc)
            lanes.steps += 1
            if lanes.steps > self.budget:
                where = self.where(pc)
                who = lanes.who(int(mask.argmax()))
                raise EmulatorError(f"{where}: more than {self.budget} basic blocks: {who} loops")
            self._block(lanes, Active(mask, bool((mask | lanes.exited).all())), pc)

    def _block(self, lanes: Lanes, active: Active, pc: int) -> None:
        """One basic block, from ``pc`` on."""
        stop = int(self.starts[np.searchsorted(self.starts, pc, side="right")])
        instructions, shadow = self.kernel.instructions, lanes.unit.shadow
        for index in range(pc, stop):
            at = instructions[index]
            chosen: Active | None = active
            try:
                if at.guard is not None:
                    chosen = _guarded(at.guard, lanes, active)
                if at.opcode in BRANCHES:
                    self._branch(at, lanes, active, chosen, index)
                    return
                if chosen is None:
                    continue
                if shadow is not None:
                    shadow.place = index
                wait = self.steps[index](lanes, chosen)
            except Fault as fault:
                raise EmulatorError(self._told(index, lanes, chosen, fault)) from None
            if wait is not None:
                wait.pc = index
                lanes.pcs[active.mask] = index if wait.again else index + 1
                lanes.pcs[active.mask & ~wait.mask] = index + 1 if not wait.again and not wait.rest else index
                lanes.parked |= wait.mask
                lanes.waits.append(wait)
                return
        lanes.pcs[active.mask] = stop

    def _branch(self, at: Instruction, lanes: Lanes, active: Active, taken: Active | None, index: int) -> None:
        lanes.pcs[active.mask] = index + 1
        if taken is None:
            return
        if at.opcode == "bra":
            target = at.operands[-1]
            assert isinstance(target, Symbol)
            lanes.pcs[taken.mask] = self._label(target.name)
        elif at.opcode == "brx":
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
            lanes.pcs[taken.mask] = self.end

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

    # -- preparing ----------------------------------------------------------------------------------------------------

    def _step(self, at: Instruction, entry: Opcode | None) -> Run:
        """What runs this instruction for the active lanes."""
        if at.opcode in BRANCHES:
            return _refuse(at)
        at = self._resolved(at)
        if entry is None:
            return _refuse(at)
        if entry.execute is None:
            return _computing(at, entry)
        execute, whole = entry.execute, entry.whole
        if not whole:
            return lambda lanes, active: execute(at, lanes, active)

        def together(lanes: Lanes, active: Active) -> Wait | None:
            return _companions(lanes, active, whole) or execute(at, lanes, active)

        return together

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
    """Addresses of variables, and the bytes of shared and of local memory; dynamic shared memory lies last."""
    addresses: dict[str, int] = {}
    used = {"shared": SHARED_FIRST, "local": 0}
    order = sorted(kernel.variables.items(), key=lambda item: item[1].size == 0)
    for name, variable in order:
        if variable.space in used:
            step = max(variable.alignment, 1024 if variable.size == 0 else 1)
            addresses[name] = -(-used[variable.space] // step) * step
            if variable.size:
                used[variable.space] = addresses[name] + variable.size
            else:
                used[variable.space] = max(used[variable.space], addresses[name] + dynamic)
        else:
            data = np.zeros(max(variable.size, 1), np.uint8)
            data[: len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
            addresses[name] = memory.add(name, data)
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


def _companions(lanes: Lanes, active: Active, size: int) -> Wait | None:
    """A wait for the other lanes of a warp (or warpgroup) that is here in part only; None where all are whole."""
    if active.full and not lanes.exited.any() and lanes.count % size == 0:
        return None
    what = "warp" if size == 32 else "warpgroup"
    if lanes.count % size:
        raise Fault(f"a block of {lanes.count} threads has no whole {what}s")
    exists = lanes.unit.exists[lanes.threads].reshape(-1, size)
    here = active.mask.reshape(-1, size)
    if (here.any(axis=1) & (lanes.exited.reshape(-1, size) & exists).any(axis=1)).any():
        raise Fault(f"lanes of the same {what} have exited")
    partial = here.any(axis=1) & (here != exists).any(axis=1)
    if not partial.any():
        return None
    parties = np.repeat(partial, size) & exists.ravel()
    wait = Wait(active.mask & parties, lambda: False, f"the other lanes of its {what}", again=True)
    wait.ready = lambda: bool((lanes.pcs[parties] == wait.pc).all())
    return wait


def _undefined_choice(lanes: Lanes, sources: Sequence[Operand], p: np.ndarray) -> np.ndarray | None:
    """(L,) where a selection's predicate, or what it chooses, is undefined."""
    none = np.zeros(lanes.count, bool)
    first, second, by = (u if (u := lanes.undefined([s])) is not None else none for s in sources)
    result = np.where(p, first, second) | by
    return result if result.any() else None


def _refuse(at: Instruction) -> Run:
    def run(lanes: Lanes, active: Active) -> None:
        raise Fault("this opcode is not known")

    return run


def _kinds(at: Instruction, count: int) -> tuple[str, list[str]]:
    """The types of the result and of the operands."""
    kind = at.kind
    kinds = [kind] * count
    if at.opcode == "prmt":
        return "b32", ["b32"] * count
    if at.opcode == "selp":  # bits, whatever they mean
        kind = f"b{8 * types.width(kind)}"
        return kind, [kind, kind, "pred"]
    if at.opcode in ("shl", "shr", "bfe"):
        kinds[1:] = ["u32"] * (count - 1)
    elif at.opcode in ("bfi", "shf"):
        kinds[2:] = ["u32"] * (count - 2)
    elif at.opcode == "setp" and count == 3:
        kinds[2] = "pred"
    elif at.opcode == "slct":
        chosen = f"b{8 * types.width(at.modifiers[-2])}"
        return chosen, [chosen, chosen, kind]
    elif at.opcode == "set":
        return at.modifiers[-2], kinds
    if at.opcode in ("setp", "testp"):
        return "pred", kinds
    if at.opcode in ("popc", "clz", "bfind"):
        return "u32", kinds
    if "wide" in at.modifiers:
        wide = kind[0] + str(2 * int(kind[1:]))
        return wide, [*kinds[:2], *[wide] * (count - 2)]
    return kind, kinds


def _computing(at: Instruction, entry: Opcode) -> Run:
    """What computes one result from numbers of one type, but for the operands that PTX gives another."""
    compute, modifiers = entry.compute, at.modifiers
    assert compute is not None
    to, *sources = at.operands
    out, kinds = _kinds(at, len(sources))
    pairs = list(zip(sources, kinds, strict=True))
    ftz, chooses = "ftz" in modifiers, at.opcode == "selp"
    bits_of = types.to_bits if at.opcode in ("neg", "abs", "copysign") else types.to_result

    def run(lanes: Lanes, active: Active) -> None:
        numbers = [lanes.number(s, k) for s, k in pairs]
        if ftz:
            numbers = [types.flushed(n) if n.dtype == np.float32 else n for n in numbers]
        result = compute(modifiers, *numbers)
        if ftz and result.dtype == np.float32:
            result = types.flushed(result)
        undefined = lanes.undefined(sources) if lanes.defined else None
        if chooses and undefined is not None:  # of what is chosen only
            undefined = _undefined_choice(lanes, sources, numbers[2])
        if isinstance(to, Vector):  # setp.p|q: of packed types one predicate of each half, else also the opposite
            both = result if result.ndim > 1 else np.stack([result, opposite(modifiers, *numbers)], axis=-1)
            for k, element in enumerate(to.elements):
                lanes.write(element, both[..., k], active, undefined)
        else:
            lanes.write(to, bits_of(result, out), active, undefined)

    return run
