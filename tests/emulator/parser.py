"""PTX text to kernels: parameters, register types, shared memory and instructions ("PTX ISA", chapters 4 and 5)."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from emulator.errors import EmulatorError

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    value: int | float


@dataclass(frozen=True)
class Address:
    base: Register | str | None  # a register, the name of a variable, or nothing
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    elements: tuple[Register | Immediate, ...]


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
    negated: bool
    line: int  # of the PTX text
    source: str  # file:line of the CUDA or Python source, where the compiler says

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> offset, bytes
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # prefix or name -> type
    variables: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # name -> state space, bytes, alignment
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the instruction after it

    def type_of(self, register: str) -> str:
        """The type that a register was declared with."""
        found = self.registers.get(register) or self.registers.get(register.rstrip("0123456789"))
        if found is None:
            raise EmulatorError(f"{self.name}: register {register} is not declared")
        return found


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
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, flags=re.M))
        self.kernel: Kernel | None = None
        self.header, self.source, self.depth = "", "", 0

    def run(self) -> dict[str, Kernel]:
        statement, start, body = "", 0, False
        for number, raw in enumerate(self.lines, start=1):
            line = raw.split("//")[0].strip()
            if line.startswith(".loc"):
                file, at = line.split()[1:3]
                self.source = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{at}"
                continue
            if not body:
                body = self._outside(line)
                continue
            start = start if statement else number
            statement = f"{statement} {line}".strip()
            while statement:
                if label := re.match(r"([$\w.]+):\s*(?!:)", statement):
                    assert self.kernel is not None
                    self.kernel.labels[label[1]] = len(self.kernel.instructions)
                    statement = statement[label.end() :]
                elif statement[0] == "{" and not statement.startswith("{%"):
                    self.depth += 1
                    statement = statement[1:].strip()
                elif statement[0] == "}":
                    self.depth -= 1
                    statement = statement[1:].strip()
                    if self.depth == 0:
                        body, statement = False, ""
                elif ";" in statement:
                    first, _, statement = statement.partition(";")
                    self._statement(first.strip(), start)
                    statement, start = statement.strip(), number
                else:
                    break
        return self.kernels

    def _outside(self, line: str) -> bool:
        """Gather a kernel's header; whether its body begins."""
        if self.header or ".entry" in line:
            self.header += " " + line
        if self.header and "{" in line:
            self._begin(self.header)
            self.header, self.depth = "", 1
            return True
        return False

    def _begin(self, header: str) -> None:
        match = re.search(r"\.entry\s+([$\w]+)\s*(?:\((.*?)\))?", header, flags=re.S)
        if match is None:
            raise EmulatorError(f"cannot read the header of a kernel: {header.strip()[:80]}")
        kernel = self.kernel = self.kernels[match[1]] = Kernel(match[1])
        for text in filter(None, map(str.strip, (match[2] or "").split(","))):
            width, count = re.search(r"\.[bsuf](\d+)\b", text), re.search(r"\[(\d+)\]", text)
            align, name = re.search(r"\.align\s+(\d+)", text), re.search(r"([$\w]+)\s*(?:\[\d+\])?$", text)
            if width is None or name is None:
                raise EmulatorError(f"{kernel.name}: cannot read parameter {text!r}")
            size = WIDTHS[width[1]] * (int(count[1]) if count else 1)
            step = int(align[1]) if align else WIDTHS[width[1]]
            offset = -(-kernel.parameter_bytes // step) * step
            kernel.parameters[name[1]] = offset, size
            kernel.parameter_bytes = offset + size

    def _statement(self, text: str, line: int) -> None:
        assert self.kernel is not None
        if not text or text.startswith((".pragma", ".maxntid", ".minnctapersm")):
            return
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            for name in names.split(","):
                self.kernel.registers[re.sub(r"<\d+>", "", name.strip())] = kind
        elif text.startswith((".shared", ".local")):
            self._variable(text)
        else:
            self.kernel.instructions.append(self._instruction(text, line))

    def _variable(self, text: str) -> None:
        space, align, width, name, count = re.match(
            r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.[bsuf](\d+)\s+([$\w]+)(?:\[(\d*)\])?", text
        ).groups()
        self.kernel.variables[name] = space, WIDTHS[width] * int(count or 1), int(align or WIDTHS[width])

    def _instruction(self, text: str, line: int) -> Instruction:
        match = re.match(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, flags=re.S)
        if match is None:
            raise EmulatorError(f"PTX line {line}: cannot read {text!r}")
        negated, guard, name, rest = match.groups()
        opcode, *modifiers = name.replace("::", ":").split(".")
        operands = tuple(_operand(part, line) for part in _split(rest))
        register = Register(guard) if guard else None
        return Instruction(opcode, tuple(modifiers), operands, register, bool(negated), line, self.source)


def _split(text: str) -> list[str]:
    """Operands, at commas outside brackets; ``a|b`` are two."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,|{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, line: int) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_scalar(part.strip(), line) for part in text.strip("{}").split(",")))
    if text[0] == "[":
        match = re.match(r"\[\s*(%?[$\w.]+)?\s*(?:\+?\s*(-?\w+))?\s*\]$", text)
        if match is None:
            raise EmulatorError(f"PTX line {line}: cannot read the address {text!r}")
        base, offset = match.groups()
        if base and re.fullmatch(r"-?\d+", base):
            return Address(None, int(base))
        return Address(Register(base) if base and base[0] == "%" else base, int(offset or "0", 0))
    return _scalar(text, line)


def _scalar(text: str, line: int) -> Register | Immediate | Symbol:
    if text[0] == "%" or text == "_":
        return Register(text)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[$\w]+", text):
        return Symbol(text)
    raise EmulatorError(f"PTX line {line}: cannot read the operand {text!r}")
