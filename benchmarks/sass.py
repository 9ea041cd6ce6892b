"""Machine code as NVIDIA's disassembler lists it: instructions, the main loop, registers, memory. No GPU is needed."""

import re
import subprocess
from pathlib import Path

TENSOR = re.compile(r"(?:[HIQ]G?MMA|UTC\w*MMA)\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?\s*([^;]*\S)\s*;", re.M)


def disassembled(file: Path, *options: str) -> str:
    """A cubin, or the machine code in a library, by the tool in Triton's own wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-sass", "-res-usage", *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def usage(text: str) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of the first kernel in a listing."""
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def instructions_of(text: str) -> list[tuple[int, str]]:
    """(address, instruction without its predicate)."""
    return [(int(address, 16), instruction) for address, instruction in INSTRUCTION.findall(text)]


def main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The smallest range with an instruction on tensor cores that a branch backwards closes, and no EXIT in it: behind
    the EXIT ptxas puts the spinning on barriers, which branches back to where it came from."""
    found: list[list[str]] = []
    for address, text in instructions:
        if target := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text):
            found.append([inner for at, inner in instructions if int(target[1], 16) <= at <= address])
    loops = (body for body in found if "EXIT" not in body and any(map(TENSOR.match, body)))
    return min(loops, key=len, default=[])
