"""PTX text to kernels: parameters, register types, variables and instructions (PTX ISA, chapters 4, 5 and 11)."""

from __future__ import annotations

import functools
import math
import re
import struct
from dataclasses import dataclass, field, replace

from emulator.errors import EmulatorError
from emulator.types import STORAGE

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # a predicate, as an operand: !%p1


@dataclass(frozen=True)
class Immediate:
    value: int | float


@dataclass(frozen=True)
class Vector:
    elements: tuple[Register | Immediate, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, or ``[tensor map, {coordinates}]``."""

    base: Register | str | None  # a register, the name of a variable, or nothing
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Symbol:
    """A label, or a variable whose address is meant."""

    name: str


Operand = Register | Immediate | Address | Vector | Symbol


@dataclass(frozen=True)
class Instruction:
    """``guard`` is the predicate register before which it runs, ``negated`` where that has to be false."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int  # of the PTX text
    source: str  # file:line of the CUDA or Python source, where the compiler says

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    @property
    def kind(self) -> str:
        """The last modifier: the type that it works on."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Variable:
    space: str  # shared, local, global, const
    size: int  # bytes; 0: shared memory whose size the launch says
    alignment: int
    initial: bytes = b""


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, bytes
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # prefix or name -> type
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the instruction after it
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets: name -> labels
    threads: tuple[int, ...] = ()  # .reqntid
    most_threads: int = 0  # .maxntid
    cluster: tuple[int, ...] = ()  # .reqnctapercluster
    target: str = ""  # sm_90a

    @functools.cached_property
    def multiplied(self) -> frozenset[str]:
        """The registers that wgmma reads or writes."""
        found: set[str] = set()
        for at in self.instructions:
            if at.opcode == "wgmma":
                vectors = [o for o in at.operands[:2] if isinstance(o, Vector)]
                found |= {r.name for v in vectors for r in v.elements if isinstance(r, Register)}
        return frozenset(found)

    @functools.cached_property
    def written(self) -> frozenset[str]:
        """The registers that an instruction may write: those among first operands."""
        first = [at.operands[0] for at in self.instructions if at.operands]
        flat = [r for o in first for r in (o.elements if isinstance(o, Vector) else (o,))]
        return frozenset(r.name for r in flat if isinstance(r, Register))

    def type_of(self, register: str) -> str:
        """The type that a register was declared with."""
        found = self.registers.get(register)
        if found is None:
            found = self.registers.get(register.rstrip("0123456789"))
            if found is None:
                raise EmulatorError(f"{self.name}: register {register} is not declared")
            self.registers[register] = found
        return found


@dataclass
class _Scope:
    """What a pair of braces declares; inline assembly reuses names in each of its own."""

    first: int  # the instruction that it begins before
    registers: dict[str, str | None] = field(default_factory=dict)  # -> the type of the one that it hides
    ranges: set[str] = field(default_factory=set)  # those of the registers that are prefixes: %r<8>
    labels: set[str] = field(default_factory=set)


def parse(text: str) -> dict[str, Kernel]:
    """The kernels (``.entry``) of a PTX module by name.

    Raises:
        EmulatorError: It cannot be read; names the line.
    """
    return _Parser(text).run()


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S).split("\n")
        self.kernels: dict[str, Kernel] = {}
        self.files = {n: path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M)}
        target = re.search(r"^\s*\.target\s+(\w+)", text, flags=re.M)
        self.target = target[1] if target else ""
        self.module: dict[str, Variable] = {}
        self.kernel = Kernel("")
        self.scopes: list[_Scope] = []
        self.source, self.serial = "", 0

    def run(self) -> dict[str, Kernel]:
        statement, start = "", 0
        for number, raw in enumerate(self.lines, start=1):
            line = raw.split("//")[0].strip()
            if re.match(r"\.loc\s", line):
                file, at = line.split()[1:3]
                self.source = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{at}"
                continue
            start = start if statement else number
            statement = f"{statement} {line}".strip()
            rest = statement
            while rest and (following := self._take(rest, start)) is not None:
                rest, start = following.strip(), number
            statement = rest
        if self.scopes:
            raise EmulatorError(f"PTX line {len(self.lines)}: cannot read a body that does not end")
        return self.kernels

    def _take(self, text: str, line: int) -> str | None:
        """Take the first statement, label or brace off; the rest, or None where the statement goes on."""
        if not self.scopes:
            return self._outside(text, line)
        if label := re.match(r"([$\w.]+):\s*(?!:)", text):
            if targets := re.match(r"[$\w.]+:\s*\.branchtargets\s+([^;]*);", text):
                self.kernel.targets[label[1]] = tuple(t.strip() for t in targets[1].split(","))
                return text[targets.end() :]
            self.kernel.labels[label[1]] = len(self.kernel.instructions)
            self.scopes[-1].labels.add(label[1])
            return text[label.end() :]
        if text[0] == "{":
            self.scopes.append(_Scope(len(self.kernel.instructions)))
            return text[1:]
        if text[0] == "}":
            self._close(self.scopes.pop())
            return text[1:]
        first, found, rest = text.partition(";")
        if not found:
            return None
        self._statement(first.strip(), line)
        return rest

    def _outside(self, text: str, line: int) -> str | None:
        """Outside of all bodies: a kernel's header up to its brace, or a module's variable or directive."""
        if ".entry" in text:
            header, found, rest = text.partition("{")
            if found:
                self._begin(header, line)
                self.scopes = [_Scope(0)]
            return rest if found else None
        if re.match(r"(\.(visible|extern|weak|common)\s+)*\.(global|const|shared)\b", text):
            first, found, rest = text.partition(";")
            if found:
                name, variable = _variable(first, line)
                self.module[name] = variable
            return rest if found else None
        if re.match(r"(\.\w+\s+)*\.(entry|func|global|const|shared|extern|visible|weak)?$", text):
            return None  # a directive alone on its line, the rest follows
        if ".func" in text:
            raise EmulatorError(f"PTX line {line}: cannot read a function: only kernels are known")
        return ""

    def _begin(self, header: str, line: int) -> None:
        match = re.search(r"\.entry\s+([$\w]+)\s*(?:\((.*?)\))?", header, flags=re.S)
        if match is None:
            raise EmulatorError(f"PTX line {line}: cannot read the header of a kernel: {header.strip()[:80]}")
        kernel = self.kernel = self.kernels[match[1]] = Kernel(
            match[1], variables=dict(self.module), target=self.target
        )
        if most := re.search(r"\.maxntid\s+([\d, ]+)", header):
            kernel.most_threads = math.prod(int(s) for s in most[1].split(","))
        for name, sizes in re.findall(r"\.(reqntid|reqnctapercluster)\s+([\d, ]+)", header):
            found = tuple(int(s) for s in sizes.split(","))
            kernel.threads, kernel.cluster = (found, kernel.cluster) if name == "reqntid" else (kernel.threads, found)
        for text in filter(None, map(str.strip, (match[2] or "").split(","))):
            width, count = re.search(r"\.[bsuf](\d+)\b", text), re.search(r"\[(\d+)\]", text)
            align, name = re.search(r"\.align\s+(\d+)", text), re.search(r"([$\w]+)\s*(?:\[\d+\])?$", text)
            if width is None or name is None:
                raise EmulatorError(f"{kernel.name}: cannot read parameter {text!r}")
            size = WIDTHS[width[1]] * (int(count[1]) if count else 1)
            # A pointer's alignment (.ptr .align 16) is that of what it points to.
            step = int(align[1]) if align and ".ptr" not in text else WIDTHS[width[1]]
            offset = -(-kernel.parameter_bytes // step) * step
            kernel.parameters[name[1]] = offset, size
            kernel.parameter_bytes = offset + size

    def _statement(self, text: str, line: int) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text)
            if match is None or match[1] not in STORAGE:
                raise EmulatorError(f"PTX line {line}: cannot read {text!r}")
            kind, names = match.groups()
            for name in names.split(","):
                plain = re.sub(r"<\d+>", "", name.strip())
                if len(self.scopes) > 1:
                    self.scopes[-1].registers[plain] = self.kernel.registers.get(plain)
                    self.scopes[-1].ranges |= {plain} if "<" in name else set()
                self.kernel.registers[plain] = kind
        elif re.match(r"\.(shared|local|const|global)\b", text):
            name, self.kernel.variables[name] = _variable(text, line)
        else:
            self.kernel.instructions.append(self._instruction(text, line))

    def _close(self, scope: _Scope) -> None:
        """Give what an inner scope declared names of its own, so that the next scope may reuse them."""
        if not self.scopes or not (scope.registers or scope.labels):
            return
        self.serial += 1
        new = {name: f"{name}@{self.serial}@" for name in (*scope.registers, *scope.labels)}
        for name, hidden in scope.registers.items():
            self.kernel.registers[new[name]] = self.kernel.registers.pop(name)
            if hidden:
                self.kernel.registers[name] = hidden
        for name in scope.labels:
            self.kernel.labels[new[name]] = self.kernel.labels.pop(name)

        def renamed(name: str) -> str:
            prefix = name.rstrip("0123456789")
            return new[name] if name in new else new[prefix] + name[len(prefix) :] if prefix in scope.ranges else name

        for index in range(scope.first, len(self.kernel.instructions)):
            at = self.kernel.instructions[index]
            guard = replace(at.guard, name=renamed(at.guard.name)) if at.guard else None
            self.kernel.instructions[index] = replace(
                at, guard=guard, operands=tuple(_rename(operand, renamed) for operand in at.operands)
            )

    def _instruction(self, text: str, line: int) -> Instruction:
        match = re.match(r"(?:@\s*(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, flags=re.S)
        if match is None:
            raise EmulatorError(f"PTX line {line}: cannot read {text!r}")
        negated, guard, name, rest = match.groups()
        opcode, *modifiers = name.replace("::", ":").split(".")
        operands = tuple(self._operand(part, line) for part in _split(rest))
        register = Register(guard, bool(negated)) if guard else None
        return Instruction(opcode, tuple(modifiers), operands, register, line, self.source)

    def _operand(self, text: str, line: int) -> Operand:
        if text[0] == "{" or "|" in text:  # d|p: a result and a predicate, as a vector of two
            return Vector(tuple(self._scalar(part.strip(), line) for part in re.split("[,|]", text.strip("{}"))))
        if text[0] == "[":
            match = re.match(r"\[\s*(%?[$\w.]+)?\s*(?:\+?\s*(-?\w+))?\s*(?:,\s*(\{[^}]*\}))?\s*\]$", text)
            if match is None:
                raise EmulatorError(f"PTX line {line}: cannot read the address {text!r}")
            base, offset, inner = match.groups()
            coordinates = self._operand(inner, line) if inner else None
            if base and re.fullmatch(r"-?\d+", base):
                return Address(None, int(base), coordinates)
            known = base and (base[0] == "%" or self._is_register(base))
            return Address(Register(base) if known else base, int(offset or "0", 0), coordinates)
        return self._scalar(text, line)

    def _is_register(self, name: str) -> bool:
        """Inline assembly may name registers without a percent sign."""
        return name in self.kernel.registers

    def _scalar(self, text: str, line: int) -> Register | Immediate | Symbol:
        negated, text = text[0] == "!", text.lstrip("!").strip()
        if text and (text[0] == "%" or text == "_" or self._is_register(text)):
            return Register(text, negated)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d*", text):
            return Immediate(float(text))
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise EmulatorError(f"PTX line {line}: cannot read the operand {text!r}")


def _rename(operand: Operand, renamed) -> Operand:
    match operand:
        case Register() | Symbol():
            return replace(operand, name=renamed(operand.name))
        case Vector():
            return Vector(tuple(_rename(element, renamed) for element in operand.elements))
        case Address(base=Register()):
            inner = operand.coordinates and _rename(operand.coordinates, renamed)
            return replace(operand, base=_rename(operand.base, renamed), coordinates=inner)
    return operand


def _split(text: str) -> list[str]:
    """Operands, at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part.strip() for part in (*parts, current) if part.strip()]


def _variable(text: str, line: int) -> tuple[str, Variable]:
    match = re.match(
        r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
        r"(?:\.attribute\([^)]*\)\s*)?(?:\.v(\d)\s+)?\.([bsuf])(\d+)\s+([$\w]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
        text,
        flags=re.S,
    )
    if match is None:
        raise EmulatorError(f"PTX line {line}: cannot read the variable {text!r}")
    space, align, vector, _, width, name, counts, values = match.groups()
    element, total = WIDTHS[width], int(vector or 1)
    for count in re.findall(r"\[(\d*)\]", counts):
        total *= int(count or 0)
    initial = b""
    for value in re.findall(r"[-\w]+", values or ""):
        number = int(value[2:], 16) if value[:2] in ("0f", "0F", "0d", "0D") else int(value.rstrip("U"), 0)
        initial += (number & ((1 << 8 * element) - 1)).to_bytes(element, "little")
    return name, Variable(space, element * total, int(align or element), initial)
