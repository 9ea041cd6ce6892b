"""The machine code of the Triton kernels for sm_80, sm_90 and sm_100: what it is made of, and what must hold of it.

    python benchmarks/machine_code.py --json machine_code.json
    python benchmarks/machine_code.py --arch 90 --full

Needs no GPU: compiles each kernel as it would be launched (one default configuration for each way in and out; with
--full every configuration that may be chosen), disassembles it and checks :data:`INVARIANTS`, which hold for any
version of the compiler. Counts of registers and instructions are only shown. Exits with 1 where one is violated.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import options
from refinenet_fast.backends import WayOut, launches
from refinenet_fast.backends.ahead import compile_ahead
from refinenet_fast.backends.base import PLAIN_OUT
from refinenet_fast.backends.configurations import A100, B200, H100, Configuration, Problem, candidates, choose
from refinenet_fast.backends.operands import pack_weight
from sass import TENSOR, disassembled, instructions_of, main_loop, usage

ARCHITECTURES = {80: A100, 90: H100, 100: B200}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COLUMNS = 512  # of tensor memory, on sm_100
PRODUCTS = ("conv3x3", "weight_grad")  # the kernels with a main loop on tensor cores

# -- what is compiled --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """In and out of a convolution; ``relued``: it writes its ReLU, too."""

    out: WayOut = PLAIN_OUT
    relu_in: bool = False
    rotated: bool = False
    relued: bool = False


def ways(y: torch.Tensor) -> dict[str, Way]:  # y: (N, K, H, W)
    """Those of the hot paths, and everything at once."""
    n, k, h, w = y.shape
    bias, low = torch.empty(k, device="meta"), maps(n, k, h // 2, w // 2, y.dtype)
    return {
        "plain": Way(),
        "first of an rcu": Way(WayOut(bias, relu=True)),
        "first of an rcu, relu in": Way(WayOut(bias, relu=True), relu_in=True),
        "second of an rcu": Way(WayOut(bias, add=(y,))),
        "second of an rcu, relu ahead": Way(WayOut(bias, add=(y,)), relued=True),
        "input gradient": Way(WayOut(select=y, add=(y,)), rotated=True),
        "end of a chain": Way(WayOut(bias, add=(y, y, y), add_relu=(y,))),
        "fusion": Way(WayOut(bias, upsample=low)),
        "everything": Way(WayOut(bias, True, y, (y, y), (y,), low), relu_in=True, relued=True),
    }


class Shape(NamedTuple):
    """To k channels by r x r taps."""

    n: int = 8
    c: int = 256
    h: int = 128
    w: int = 128
    k: int = 256
    r: int = 3

    def __str__(self) -> str:
        return f"{self.r}x{self.r} {self.c}->{self.k} at {self.h}x{self.w}"


TYPICAL, SMALL, POINTWISE = Shape(), Shape(c=512, h=16, w=16, k=512), Shape(r=1)
ODD = Shape(c=254, k=254)  # strides that are no multiples of 16 bytes: over pointers on every architecture


@dataclass(frozen=True)
class Case:
    """A launch and where it comes from."""

    kernel: str
    way: str
    shape: Shape
    dtype: torch.dtype
    capability: int
    launch: launches.Launch
    configuration: Configuration | None = None


def maps(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> torch.Tensor:  # (N, C, H, W)
    """Of no memory."""
    return torch.empty((n, h, w, c), dtype=dtype, device="meta").permute(0, 3, 1, 2)


def cases(capability: int, full: bool = False) -> list[Case]:
    """One configuration of every kernel and way, or every configuration."""
    found = []
    for name in ways(maps(1, 1, 2, 2, BF16)):
        if full or name != "everything":  # which no hot path asks for
            found += convolutions(name, TYPICAL, BF16, capability, full=full)
    kinds = [(TYPICAL, FP16, True), (TYPICAL, FP32, True), (TYPICAL, FP32, False)]
    kinds += [(shape, BF16, True) for shape in (SMALL, POINTWISE, ODD)]
    for shape, dtype, tf32 in kinds:
        for name in ("plain", "first of an rcu, relu in") if full else ("plain",):
            found += convolutions(name, shape, dtype, capability, tf32, full)
    for shape, dtype, tf32 in [(TYPICAL, BF16, True), *kinds]:
        for relu_in in (False, True) if full or (shape, dtype) == (TYPICAL, BF16) else (False,):
            found += weight_gradients(relu_in, shape, dtype, capability, tf32, full)
    for dtype in (BF16, FP32):
        found += others(dtype, capability)
    return found


def _configurations(kernel: str, capability: int, problem: Problem, full: bool) -> tuple[Configuration, ...]:
    one = choose(kernel, ARCHITECTURES[capability], problem)
    return candidates(kernel, ARCHITECTURES[capability], problem) if full else (one,)


def convolutions(
    name: str, shape: Shape, dtype: torch.dtype, capability: int, tf32: bool = True, full: bool = False
) -> list[Case]:
    """A way's launches, the sum of splits included where there are any."""
    x, y = (maps(shape.n, c, shape.h, shape.w, dtype) for c in (shape.c, shape.k))
    way = ways(y)[name]
    kc = (shape.c, shape.k) if way.rotated else (shape.k, shape.c)
    packed = pack_weight(torch.empty((*kc, shape.r, shape.r), device="meta"), dtype, way.rotated)
    relued, label = y if way.relued else None, name + f", {launches.precision(tf32)}" * (dtype == FP32)
    found = []
    problem = launches.problem_of(x, packed.shape[1], packed.shape[0], tf32)
    for c in _configurations("conv3x3", capability, problem, full):
        for launch in launches.convolution(x, packed, y, relued, way.relu_in, way.out, c, way.rotated, tf32):
            known = c if launch.kernel in PRODUCTS else None
            found.append(Case(launch.kernel, label, shape, dtype, capability, launch, known))
    return found


def weight_gradients(
    relu_in: bool, shape: Shape, dtype: torch.dtype, capability: int, tf32: bool = True, full: bool = False
) -> list[Case]:
    """The product and the sum of its splits."""
    x, gy = (maps(shape.n, c, shape.h, shape.w, dtype) for c in (shape.c, shape.k))
    gw = torch.empty((shape.k, shape.c, shape.r, shape.r), device="meta")
    problem = launches.problem_of(x, shape.k, shape.r**2, tf32)
    name = ("relu in" if relu_in else "plain") + f", {launches.precision(tf32)}" * (dtype == FP32)
    found = []
    # Over descriptors its ReLU is a pass before it.
    known = [c for c in _configurations("weight_grad", capability, problem, full) if not (relu_in and c.described)]
    for c in known:
        product, total = launches.weight_gradient(x, gy, gw, relu_in, c, tf32)
        found.append(Case("weight_grad", name, shape, dtype, capability, product, c))
        if c.splits > 1:
            found.append(Case(total.kernel, name, shape, dtype, capability, total))
    return found


def others(dtype: torch.dtype, capability: int) -> list[Case]:
    large, small = maps(8, 256, 128, 128, dtype), maps(8, 256, 64, 64, dtype)
    argmax = large.to(torch.uint8)
    packed = torch.empty((1, 256, 256), dtype=dtype, device="meta")
    found = {
        "bias": launches.bias_gradient(large, torch.empty(256, device="meta"), 256)[0],
        "plain": launches.pool(large, large, None, False),
        "argmax": launches.pool(large, large, argmax, False),
        "relu, argmax": launches.pool(large, large, argmax, True),
        "backward": launches.pool_backward(large, argmax, None, large),
        "backward, add": launches.pool_backward(large, argmax, large, large),
        "add, corners": launches.upsampling(small, large, large, True),
        "no corners": launches.upsampling(small, None, large, False),
        "backward, corners": launches.upsampling_backward(large, small, True),
        "backward, no corners": launches.upsampling_backward(large, small, False),
    }
    for name in ("first of an rcu, relu in", "end of a chain"):
        way = ways(large)[name]
        found[name] = launches.pool_convolution(large, packed, large, None, way.relu_in, way.out)
    shape = {"pool_conv1x1": POINTWISE}
    return [Case(one.kernel, way, shape.get(one.kernel, TYPICAL), dtype, capability, one) for way, one in found.items()]


# -- reading it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transaction:
    """What one phase of an mbarrier waits for, in bytes: as announced, as copied in boxes, as room for it."""

    expected: int
    boxes: int
    buffers: int


@dataclass(frozen=True)
class Code:
    """A compiled kernel, read."""

    registers: int
    stack: int
    shared: int  # bytes of shared memory that a block asks for
    columns: int  # of tensor memory
    sass: tuple[str, ...]  # the instructions without predicates and addresses
    loop: tuple[str, ...]  # those of the main loop; empty: there is none
    transactions: tuple[Transaction, ...]  # one for each expect_tx of the PTX
    notes: tuple[str, ...]  # what ptxas had to say, but for its statistics
    triton: tuple[int, ...]  # the compiler's version

    def count(self, *names: str, loop: bool = False) -> int:
        """How many instructions' names begin with one of these."""
        return sum(text.startswith(names) for text in (self.loop if loop else self.sass))

    @property
    def tensor(self) -> Counter:
        """The main loop's instructions on tensor cores, and how many of each."""
        return Counter(text.split()[0] for text in self.loop if TENSOR.match(text))

    @property
    def operand_a(self) -> str:
        """Where they take A from: descriptor, register, tensor memory, several of them, or "" for none."""
        return ", ".join(sorted({_operand_a(text) for text in self.loop if TENSOR.match(text)}))


STATISTICS = re.compile(r"bytes gmem|Compiling entry|Function properties|stack frame|Used \d+ reg|Compile time|^\s*$")


def _operand_a(text: str) -> str:
    name, operands = text.split(maxsplit=1)
    first = [operand.strip() for operand in operands.split(",")]
    source = first[0] if name.startswith("UTC") else first[1]  # the others name the result first
    return {"gdesc": "descriptor", "tmem": "tensor memory"}.get(source.partition("[")[0], "register")


def read(case: Case) -> Code:
    """Compiles and reads it."""
    compiled = compile_ahead(case.launch, case.capability)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "kernel.cubin")).write_bytes(compiled.asm["cubin"])
        listing = disassembled(file)
    registers, memory = usage(listing)
    instructions = instructions_of(listing)
    sass, loop = tuple(text for _, text in instructions), tuple(main_loop(instructions))
    copied = transactions(ptx, compiled.asm["ttgir"], metadata.tensordesc_meta or [], metadata.num_warps)
    triton = tuple(int(part) for part in version("triton").split(".")[:2])
    memories = memory, metadata.shared, metadata.tmem_size or 0
    return Code(registers, *memories, sass, loop, copied, remarks(ptx, case.capability), triton)


def remarks(ptx: str, capability: int) -> tuple[str, ...]:
    """What Triton's ptxas says of it: Triton throws it away."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    command = [get_ptxas(capability).path, "-v", "-lineinfo", f"--gpu-name={sm_arch_from_capability(capability)}"]
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder, "kernel.ptx")).write_text(ptx)
        command += [str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(line for line in (done.stdout + done.stderr).splitlines() if not STATISTICS.search(line))


def transactions(ptx: str, ttgir: str, tensor_maps: list[dict[str, Any]], warps: int) -> tuple[Transaction, ...]:
    """Announced and copied by the PTX; room for it as the TTGIR allocates it, in the same order."""
    both = zip_longest(_announced(ptx, tensor_maps, warps), _buffers(ttgir))
    return tuple(Transaction(*(announced or (0, 0)), room or 0) for announced, room in both)


def _announced(ptx: str, tensor_maps: list[dict[str, Any]], warps: int) -> list[list[int]]:
    """[expected, copied] of each expect_tx: the copies to its barrier's register that follow it, up to the next."""
    sizes = [math.prod(tensor_map["block_size"]) * tensor_map["elem_size"] for tensor_map in tensor_maps]
    bytes_of = dict(zip(re.findall(r"\.param \.align \d+ \.b8 (\w+)\[128\]", ptx), sizes))
    found, waiting = [], {}
    expect = r"mbarrier\.arrive\.expect_tx\S* _, \[(?P<barrier>%\w+)[^]]*\], (?P<bytes>\d+);"
    copy = r"@(?P<many>%\w+) cp\.async\.bulk\.tensor\.\S*mbarrier\S* \[[^]]*\], \[(?P<map>%\w+)[^]]*\], \[(?P<to>%\w+)"
    defined = _definitions(ptx)
    for m in re.finditer(f"{expect}|{copy}", ptx):
        if m["bytes"]:
            waiting[m["barrier"]] = [int(m["bytes"]), 0]
            found.append(waiting[m["barrier"]])
        else:
            parameter = m["map"]
            while parameter in defined:  # the register holds the parameter's address
                parameter = defined[parameter][1][0]
            waiting[m["to"]][1] += bytes_of[parameter] * _issuers(m["many"], defined, warps)
    return found


def _definitions(ptx: str) -> dict[str, tuple[str, list[str]]]:
    """Register: (the instruction that writes it, what it reads)."""
    found = {}
    for name, operands in re.findall(r"^\s*([a-z][\w.]*)\s+(%[^;{}]*);", ptx, re.M):
        written, *given = [operand.strip() for operand in operands.split(",")]
        found |= dict.fromkeys(written.split("|"), (name, given))
    return found


def _issuers(predicate: str, defined: dict[str, tuple[str, list[str]]], warps: int) -> int:
    """How many warps issue a copy, each by one elected thread: those below a bound on the thread's number."""
    name, given = defined.get(predicate, ("", []))
    if name.startswith("and.pred"):
        return min(_issuers(operand, defined, warps) for operand in given)
    if name.startswith("setp.lt.u32") and given[1].isdecimal():
        thread = given[0]
        while defined.get(thread, ("",))[0].startswith("and.b32"):
            thread = defined[thread][1][0]
        if "%tid.x" in defined.get(thread, ("", []))[1]:
            return max(1, int(given[1]) // 32)
    return warps


def _buffers(ttgir: str) -> list[int]:
    """Bytes of the buffers that the copies of each barrier_expect fill."""
    found, waiting = [], {}
    expect = r"ttng\.barrier_expect (?P<barrier>%\w+),"
    copy = r"async_tma_copy_global_to_local [^\]]*\] %\w+, (?P<to>%\w+),.*"
    copy += r"-> !ttg\.memdesc<(?P<shape>(?:\d+x)+)\D+(?P<bits>\d+)"
    for m in re.finditer(f"{expect}|{copy}", ttgir):
        if m["barrier"]:
            waiting[m["barrier"]] = len(found)
            found.append(0)
        else:
            found[waiting[m["to"]]] += math.prod(map(int, m["shape"][:-1].split("x"))) * int(m["bits"]) // 8
    return found


# -- what must hold ----------------------------------------------------------------------------------------------------


def intended(case: Case) -> tuple[str, str]:
    """The main loop's instruction on tensor cores, and where it takes operand A from."""
    c, capability, wide = case.launch.constants, case.capability, case.dtype == FP32
    m, n = (c["TH"] * c["TW"], c["BN"]) if case.kernel == "conv3x3" else (c["BK"], c["BC"])
    kind = {BF16: ".BF16", FP16: "", FP32: ".TF32"}[case.dtype]
    if capability < 90 or m < 64:  # wgmma and tcgen05 take 64 rows at least
        return f"HMMA.{1688 if wide else 16816}.F32{kind}", "register"
    # Threads change A before it is multiplied: its ReLU; its parts, where three products stand for one of float32.
    changed = (case.kernel == "conv3x3" and c["RELU_IN"]) or (wide and c["PRECISION"] == "tf32x3")
    if capability >= 100:
        return "UTCHMMA", "tensor memory" if changed else "descriptor"
    # A box of several rows loses its layout for wgmma. TF32's weight gradient is transposed in shared memory anyway.
    box = c["TH"] > 1 and (case.kernel == "conv3x3" or not wide)
    across = max(1, case.launch.warps // 4 // (m // 64))  # groups of warps beside each other
    shape = f"64x{n // across}x{8 if wide else 16}"
    return f"HGMMA.{shape}.F32{kind}", "register" if changed or box else "descriptor"


def stores_by(case: Case) -> str:
    """Why threads have to write to shared memory in the main loop; "": they need not."""
    c, wide = case.launch.constants, case.dtype == FP32
    if not c["DESCRIBED"] and any(size % 16 for size in (case.shape.c, case.shape.k)):
        return "only of multiples of 16 does Triton know that whole vectors can be copied asynchronously"
    if case.capability < 90:
        return ""
    if wide and c["PRECISION"] == "tf32x3":
        return "B's parts must be in shared memory"
    if case.kernel == "weight_grad" and c["RELU_IN"]:
        return "B, the pixels, must be in shared memory after its ReLU"
    return "tensor cores transpose 16-bit types only" if case.kernel == "weight_grad" and wide else ""


def no_spills(case: Case, code: Code) -> list[str]:
    text = f"spills: {code.count('STL')} STL, {code.count('LDL')} LDL, a stack of {code.stack} bytes"
    return [text] if code.count("STL", "LDL") or code.stack else []


def fits(case: Case, code: Code) -> list[str]:
    shared = ARCHITECTURES[case.capability].shared
    asked = (code.shared, shared, "bytes of shared memory"), (code.columns, COLUMNS, "columns of tensor memory")
    return [f"{size} {what}, of {limit}" for size, limit, what in asked if size > limit]


def multiplies_as_intended(case: Case, code: Code) -> list[str]:
    (tensor, a), got = intended(case), ", ".join(code.tensor) or "nothing"
    found = [f"multiplies by {got}, not {tensor}"] * (got != tensor)
    return found if code.operand_a == a else [*found, f"operand A from {code.operand_a or 'nowhere'}, not {a}"]


def loop_stores_nothing(case: Case, code: Code) -> list[str]:
    stores = 0 if stores_by(case) else code.count("STS", loop=True)
    return [f"{stores} STS in the main loop"] if stores else []


def relu_is_native(case: Case, code: Code) -> list[str]:
    """A bfloat16 ReLU on the way in stays bfloat16; Triton 3.6 promotes it whatever is written."""
    if not case.launch.constants["RELU_IN"] or case.dtype != BF16 or code.triton < (3, 9):
        return []
    promoted = code.count("FMNMX", "FSETP", "FSEL", loop=True)
    native = any(text.startswith("HMNMX2.BF16") for text in code.loop)
    return [] if native and not promoted else [f"a bfloat16 ReLU in float32: {promoted} instructions"]


def not_serialized(case: Case, code: Code) -> list[str]:
    """Each wgmma waiting for the one before."""
    return [note.partition(": ")[2] or note for note in code.notes if "serialized" in note]


def barriers_count_right(case: Case, code: Code) -> list[str]:
    wrong = {t for t in code.transactions if not t.expected == t.boxes == t.buffers}
    found = [f"{t.expected} bytes expected, {t.boxes} in boxes, {t.buffers} in buffers" for t in wrong]
    silent = case.launch.constants["DESCRIBED"] and not code.transactions
    return [*found, "descriptors, and no copy in bulk"] if silent else found


OF_PRODUCTS = (multiplies_as_intended, loop_stores_nothing, relu_is_native, not_serialized, barriers_count_right)
INVARIANTS = (no_spills, fits, *OF_PRODUCTS)


def violations(case: Case, code: Code) -> list[str]:
    hold = INVARIANTS if case.kernel in PRODUCTS else (no_spills, fits)
    return [text for invariant in hold for text in invariant(case, code)]


# -- the command -------------------------------------------------------------------------------------------------------


COLUMNS_SHOWN = ("kernel", "way", "shape", "dtype", "arch", "tile", "warps", "stages", "registers", "stack", "spills")
COLUMNS_SHOWN += ("shared", "tensor", "A", "UTMALDG", "STS", "instructions")


def examine(case: Case) -> dict[str, Any]:
    """A row of the table."""
    c, dtype = case.configuration, str(case.dtype).partition(".")[2]
    row: dict[str, Any] = {"kernel": case.kernel, "way": case.way, "shape": str(case.shape), "dtype": dtype}
    row |= {"arch": f"sm_{case.capability}", "warps": case.launch.warps, "stages": case.launch.stages}
    row |= {
        "configuration": c and asdict(c),
        "tile": c and f"{c.rows}x{c.columns} {c.outs} {c.channels}" + f" /{c.splits}" * (c.splits > 1),
    }
    try:
        code = read(case)
    except Exception as error:  # it does not compile: one row says so, the others go on
        return row | {"violations": [f"{type(error).__name__}: {error}".splitlines()[0][:200]]}
    row |= {"registers": code.registers, "stack": code.stack, "shared": code.shared, "tensor memory": code.columns}
    row |= {"STL": code.count("STL"), "LDL": code.count("LDL"), "tensor": dict(code.tensor), "A": code.operand_a}
    row |= {"UTMALDG": code.count("UTMALDG", loop=True), "STS": code.count("STS", loop=True), "loop": len(code.loop)}
    row |= {"instructions": len(code.sass), "transactions": sorted({t.expected for t in code.transactions})}
    return row | {"notes": code.notes, "violations": violations(case, code)}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Triton {version('triton')}; tile: pixels, output and input channels /splits")
    for column in COLUMNS_SHOWN:
        table.add_column(column)
    console = Console(width=None if sys.stdout.isatty() else 240)
    for row in rows:
        tensor = ", ".join(f"{count} {name}" for name, count in row.get("tensor", {}).items())
        shown = row | {"tensor": tensor, "spills": row.get("STL", 0) + row.get("LDL", 0)}
        cells = ["" if shown.get(column) is None else str(shown[column]) for column in COLUMNS_SHOWN]
        table.add_row(*cells, style="red" if row["violations"] else None)
    console.print(table)
    for row in rows:
        what = ", ".join(str(row[name]) for name in COLUMNS_SHOWN[:6] if row[name])
        for text in row["violations"]:
            console.print(f"{what}: {text}", style="red", markup=False, highlight=False)


def main() -> int:
    parser = options.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, help="default: all of them")
    parser.add_argument("--full", action="store_true", help="every configuration that may be chosen: an hour")
    parser.add_argument("--json", metavar="FILE", type=options.output_file, help="write every row to FILE")
    args = parser.parse_args()
    found = [case for arch in ARCHITECTURES if args.arch in (None, arch) for case in cases(arch, args.full)]
    rows = [examine(case) for case in track(found, "compiling", console=Console(stderr=True), transient=True)]
    show(rows)
    if args.json:
        options.write_json(args.json, {"command": sys.argv, "triton": version("triton"), "rows": rows})
    return int(any(row["violations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
