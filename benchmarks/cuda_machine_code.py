"""The machine code of the CUDA backend's kernels, as it lies in the built extension: what must hold of it.

    python benchmarks/cuda_machine_code.py
    python benchmarks/cuda_machine_code.py --arch 80

Needs no GPU and compiles nothing: disassembles ``refinenet_fast._C`` and checks :data:`INVARIANTS` of the convolutions
and gradients, and of all kernels that they use no memory for registers, which holds for any version of nvcc. Counts of
registers and instructions are only shown. Exits with 1 where one is violated.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

import options
from refinenet_fast import _native, build_info
from sass import TENSOR, disassembled, instructions_of, main_loop, usage

# What the tensor cores are asked for, and how many products stand for one.
PRODUCTS = {
    "BFloat16": ("HMMA.16816.F32.BF16", 1),
    "Float16": ("HMMA.16816.F32", 1),
    "Tf32": ("HMMA.1688.F32.TF32", 1),
    "Tf32x3": ("HMMA.1688.F32.TF32", 3),
}
# The loop for sm_90a asks for one product of all output channels, [64, 16] by [16, tile].
WARPGROUP = {"BFloat16": "HGMMA.64x{}x16.F32.BF16", "Float16": "HGMMA.64x{}x16.F32"}
INSTANCE = re.compile(
    r"(?P<kernel>conv|grad|wgmma)_kernelINS0_\d+(?P<arithmetic>[BFT]\w+?)ENS0_\d+(?P<way_in>Unchanged|Rectified)"
    r"E(?:NS0_\d+Copy(?P<copy>Chunks|Pieces)E)?Li(?P<tile>\d+)E"
)
POOL_INSTANCE = re.compile(r"(?P<kernel>pool)_kernelINS0_\d+(?P<arithmetic>[BFT]\w+?)ELi(?P<side>\d)ELi(?P<tile>\d+)E")
# Of the convolution, of the one that pools and of the weight gradient; these have no large tiles of three products.
INSTANCES = 24 + 14 + 22
OTHERS = 6 + 3 + 24 + 6 + 12  # that sum splits of both; maxpool5, forward and backward; bilinear, both
# Bilinear's adjoint element by element: by nvcc 13.0 a stack of 8 bytes on sm_90a, of 24 on sm_100.
SPILLS = re.compile(r"backward_kernelI\w+Li1EEEvNS_16BilinearBackwardE")
HOPPER_INSTANCES = 12  # of the loop for sm_90a: two types, two ways in, three widths


@dataclass(frozen=True)
class Code:
    """One instance of a kernel template on one architecture."""

    kernel: str
    arithmetic: str
    way_in: str
    copy: str  # "" of the loop for sm_90a, where it is all TMA's
    tile: int
    registers: int
    memory: int  # bytes of stack and local memory
    sass: tuple[str, ...]
    loop: tuple[str, ...]  # the main one
    side: int = 0  # of a convolution that pools, of taps; of others 0

    def __str__(self) -> str:
        return " ".join(map(str, (self.kernel, self.arithmetic, self.way_in, self.copy, self.side or "", self.tile)))

    @property
    def edge(self) -> int:
        """Of the square of sums that a warp has."""
        return min(self.tile, 128) // 2

    def count(self, *names: str, loop: bool = False) -> int:
        """How many instructions' names begin with one of these."""
        return sum(text.startswith(names) for text in (self.loop if loop else self.sass))

    @property
    def tensor(self) -> Counter:
        """The main loop's instructions on tensor cores, and how many of each."""
        return Counter(text.split()[0] for text in self.loop if TENSOR.match(text))


@cache
def listing_of(arch: str) -> str:
    """The extension's machine code for an architecture."""
    return disassembled(Path(_native._C.__file__), "-arch", arch)


def read(arch: str) -> list[Code]:
    """Every instance that was built for an architecture ("sm_80")."""
    listing = listing_of(arch)
    _, *bodies = re.split(r"^\s+Function : (?=\S)", listing, flags=re.M)
    found = []
    for body in bodies:
        name = body.split(maxsplit=1)[0]
        if instance := INSTANCE.search(name) or POOL_INSTANCE.search(name):
            registers, memory = usage(listing[listing.index(f"Function {name}:") :])
            instructions = instructions_of(body)
            texts = tuple(text for _, text in instructions)
            given = instance.groupdict("")
            fields = {"way_in": "Pooled", "copy": "Chunks", **given, "tile": int(given["tile"])}
            fields["side"] = int(given.get("side", 0))
            code = Code(**fields, registers=registers, memory=memory, sass=texts, loop=tuple(main_loop(instructions)))
            found.append(code)
    return found


def memory_of_all(arch: str) -> dict[str, tuple[int, int]]:
    """Of every kernel for an architecture: bytes of stack and local memory, and instructions that use it."""
    listing = listing_of(arch)
    _, *bodies = re.split(r"^\s+Function : (?=\S)", listing, flags=re.M)
    found = {}
    for body in bodies:
        name = body.split(maxsplit=1)[0]
        _, memory = usage(listing[listing.index(f"Function {name}:") :])
        found[name] = memory, sum(text.startswith(("STL", "LDL")) for _, text in instructions_of(body))
    return found


# -- what must hold ----------------------------------------------------------------------------------------------------


def spills(arch: str) -> dict[str, tuple[int, int]]:
    """Of :func:`memory_of_all` what must not be."""
    return {name: found for name, found in memory_of_all(arch).items() if any(found) and not SPILLS.search(name)}


def no_spills(code: Code) -> list[str]:
    found = code.count("STL", "LDL")
    return [f"spills: {found} instructions, {code.memory} bytes"] if found or code.memory else []


def multiplies_as_intended(code: Code) -> list[str]:
    """One stage's products: two steps along the sum, of a quarter of the tile for each warp; and those by ones.

    On sm_90a four steps, of the whole tile.
    """
    if code.kernel == "wgmma":
        want = {WARPGROUP[code.arithmetic].format(code.tile): 4}
        return [] if dict(code.tensor) == want else [f"multiplies by {dict(code.tensor)} in the main loop, not {want}"]
    name, each = PRODUCTS[code.arithmetic]
    bias = 0 if code.kernel != "grad" else 2 if code.arithmetic.startswith("Tf32") else 1
    want = {name: 2 * (code.edge // 16 * code.edge // 8 * each + code.tile // 64 * bias)}
    return [] if dict(code.tensor) == want else [f"multiplies by {dict(code.tensor)} in the main loop, not {want}"]


def copies_ahead(code: Code) -> list[str]:
    """Behind the threads' backs, straight into shared memory; on sm_90a by another warp."""
    if code.copy == "Pieces":
        return []
    if code.kernel == "wgmma":
        moved = code.count("STS", "LDG", "LDS.", "UTMALDG", loop=True)
        loads = code.count("UTMALDG")
        return [] if not moved and loads == 2 else [f"{moved} copies in the main loop, {loads} UTMALDG"]
    wide = sum(text.startswith("LDGSTS") and ".128" in text for text in code.loop)
    stores = code.count("STS", loop=True)
    loads = code.count("LDG.", loop=True)
    if code.kernel == "pool":
        return pools_in_place(code, wide)
    if wide == code.tile // 16 and not stores and not loads:
        return []
    return [f"{wide} LDGSTS, {stores} STS, {loads} LDG in the main loop"]


def pools_in_place(code: Code, wide: int) -> list[str]:
    """Each line of pixels is read once, its maxima are written once: 8 bytes at a time, along rows and columns."""
    pooled = 8 + code.side - 1
    raw = pooled + 4
    want = code.tile // 32 + -(-raw * raw // 32), 2 * raw, 2 * pooled
    found = wide, *(sum(re.match(rf"{name}\S*\.64", text) is not None for text in code.loop) for name in ("LDS", "STS"))
    return [] if found == want else [f"{found} LDGSTS, LDS.64 and STS.64 in the main loop, not {want}"]


def fragments_by_matrices(code: Code) -> list[str]:
    """All but those of float32 that would have to be transposed; on sm_90a where pixels are rectified."""
    if code.kernel == "wgmma":
        found = sum(text.startswith("LDSM.16.M88.4") for text in code.loop)
        return [] if found == (4 if code.way_in == "Rectified" else 0) else [f"{found} LDSM in the main loop"]
    if code.kernel == "grad" and code.arithmetic.startswith("Tf32"):
        return []
    want = 2 * (2 * (code.edge // 16) + (code.tile // 64 if code.kernel == "grad" else 0))  # those of the bias again
    found = [text for text in code.loop if text.startswith("LDSM.16") and ".4 " in text]
    turned = sum(".MT88" in text for text in found)
    if len(found) != want or turned != (want if code.kernel == "grad" else 0):
        return [f"{len(found)} LDSM, {turned} transposed, of {want}"]
    return []


def relu_is_native(code: Code) -> list[str]:
    """A 16-bit ReLU stays in its type."""
    if code.way_in == "Unchanged" or code.arithmetic.startswith("Tf32"):
        return []
    promoted = code.count("FMNMX", "FSETP", "FSEL", loop=True)
    native = code.count("HMNMX2", "VHMNMX", loop=True)
    return [] if native and not promoted else [f"a 16-bit ReLU in float32: {promoted} instructions, {native} native"]


def operands_as_intended(code: Code) -> list[str]:
    """wgmma's operand A from a descriptor, and where it is rectified from registers."""
    if code.kernel != "wgmma":
        return []
    registers = sum(bool(re.match(r"HGMMA\S+ R\d+, R\d+, gdesc", text)) for text in code.loop)
    return [] if registers == (4 if code.way_in == "Rectified" else 0) else [f"{registers} operands A in registers"]


def nothing_waits_for_memory(code: Code) -> list[str]:
    """No fence for other blocks' sake, which waits for all writes or forgets what was cached, in sm_90a's main loop."""
    if code.kernel != "wgmma":
        return []
    found = code.count("MEMBAR", "CCTL", "ERRBAR", loop=True)
    return [f"{found} fences in the main loop"] if found else []


def stores_by_slices(code: Code) -> list[str]:
    """A plain way out on sm_90a: TMA stores each slice of 32 output channels, and its ReLU."""
    if code.kernel != "wgmma":
        return []
    found, want = code.count("UTMASTG"), 2 * code.tile // 32
    return [] if found == want else [f"{found} UTMASTG, not {want}"]


def loads_overlap_products(code: Code) -> list[str]:
    """In sm_90a's main loop one group of products is still in flight whenever the next operands are waited for."""
    if code.kernel != "wgmma":
        return []
    found = [text for text in code.loop if text.startswith("WARPGROUP.DEPBAR")]
    waits, drained = code.count("SYNCS.PHASECHK", loop=True), [text for text in found if not text.endswith(", 0x1")]
    if len(found) == (4 if code.way_in == "Rectified" else 1) and waits and not drained:
        return []
    return [f"{waits} waits for operands; products: {found} in the main loop"]


def registers_move(code: Code) -> list[str]:
    """From sm_90a's producer to its consumers: setmaxnreg, once each way."""
    if code.kernel != "wgmma":
        return []
    found = code.count("USETMAXREG.TRY_ALLOC"), code.count("USETMAXREG.DEALLOC")
    return [] if found == (1, 1) else [f"{found} USETMAXREG that take and give registers"]


INVARIANTS = (
    *(loads_overlap_products, registers_move),
    *(no_spills, multiplies_as_intended, copies_ahead, fragments_by_matrices, relu_is_native),
    *(operands_as_intended, nothing_waits_for_memory, stores_by_slices),
)


def violations(code: Code) -> list[str]:
    return [text for invariant in INVARIANTS for text in invariant(code)]


# -- the command -------------------------------------------------------------------------------------------------------


def architectures() -> list[str]:
    """That the extension was built for, as they are named in it."""
    return [f"sm_{arch.split('-')[0]}" for arch in build_info()["cuda"]["archs"]]


def main() -> int:
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", help="80, 90a, 100; default: all that were built")
    args = parser.parse_args()
    console, failed = Console(), False
    for arch in [f"sm_{args.arch}"] if args.arch else architectures():
        table = Table("instance", "registers", "instructions", "main loop", "products", title=arch)
        for code in read(arch):
            products = ", ".join(f"{count} {name}" for name, count in code.tensor.items())
            found = violations(code)
            failed = failed or bool(found)
            sizes = map(str, (code, code.registers, len(code.sass), len(code.loop)))
            table.add_row(*sizes, "; ".join([products, *found]), style="red" if found else None)
        console.print(table)
        for name, (memory, used) in spills(arch).items():
            console.print(f"{name}: {memory} bytes of stack and local memory, {used} instructions", style="red")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
