"""What arithmetic allows: the floor under the time of every kernel and hot path, on each known GPU.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --gpu H100 --batch 8 --channels 256 --size 128 --json roofline.json

No GPU is needed. The floor of a kernel is the larger of two times: its floating-point operations at the peak of the
tensor cores, and its bytes, each tensor read or written once, at the bandwidth of the memory. That of a hot path is the
sum over its kernels as `refinenet_fast/ops/` runs them, each with all that it does on its way in and out.
Beside it stands what was measured: from benchmarks/results/, where a file has that kernel, shape, dtype and GPU.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

import options

RESULTS = Path(__file__).resolve().parent / "results"

# ---- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU: dense products, no sparsity.

    Attributes:
        devices: Its names as PyTorch reports them. Only these: a PCIe card, an NVL or a MIG slice has other peaks.
        tf32, half: TFLOP/s of float32 tensors multiplied as TF32, and of bfloat16 and float16.
        bandwidth: TB/s.
    """

    devices: tuple[str, ...]
    tf32: float
    half: float
    bandwidth: float

    def tflops(self, dtype: str) -> float:
        return self.tf32 if dtype == "float32" else self.half


GPUS = {
    # NVIDIA A100 Tensor Core GPU datasheet, column "A100 80GB SXM".
    "A100": Gpu(("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), tf32=156, half=312, bandwidth=2.039),
    # NVIDIA H100 Tensor Core GPU Architecture (whitepaper), H100 SXM5; the bandwidth: H100 datasheet, "H100 SXM".
    "H100": Gpu(("NVIDIA H100 80GB HBM3",), tf32=494.7, half=989.4, bandwidth=3.35),
    # NVIDIA H200 Tensor Core GPU datasheet, "H200 SXM": the processor of the H100, faster memory.
    "H200": Gpu(("NVIDIA H200",), tf32=494.7, half=989.4, bandwidth=4.8),
    # NVIDIA Blackwell Architecture Technical Brief, HGX B200: 2.25 PFLOP/s of 16-bit formats, 8 TB/s. TF32 has half the
    # operations; the brief rounds them to 1.1.
    "B200": Gpu(("NVIDIA B200",), tf32=1125, half=2250, bandwidth=8.0),
}

# ---- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """The sizes of a tensor (N, C, H, W)."""

    n: int
    c: int
    h: int
    w: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.h}x{self.w}"

    @property
    def elements(self) -> int:
        return self.n * self.c * self.h * self.w

    @property
    def half_size(self) -> Map:
        """(N, C, h, w): the smaller map of a fusion, as `bench_fusion.py` and `bench_bilinear.py` have it."""
        return Map(self.n, self.c, (self.h + 1) // 2, (self.w + 1) // 2)


@dataclass(frozen=True)
class Work:
    """What one kernel has to do, whatever the dtype.

    Attributes:
        flops: Multiplications plus additions on the tensor cores. Comparisons of a pool and the sums of an upsampling
            or a bias gradient run elsewhere and beside the loads: those kernels count none, memory bounds them.
        elements: Read plus written, each tensor once, in the dtype of the maps; weights and their gradients too.
        argmax: Bytes of argmax read or written.
    """

    flops: int
    elements: int
    argmax: int = 0

    def nbytes(self, size: int) -> int:
        """Bytes that must move, for elements of `size` bytes."""
        return self.elements * size + self.argmax


def conv_flops(x: Map, k: int, taps: int) -> int:
    """2 N H W K C taps: each of the N K H W results is a sum of C taps products."""
    return 2 * x.n * x.h * x.w * k * x.c * taps


def conv(
    x: Map, k: int | None = None, taps: int = 9, bias: bool = False, maps: int = 0, low: int = 0, outs: int = 1
) -> Work:
    """A convolution of x (N, C, H, W) to k channels, all of its ways in and out within the kernel.

    It reads x, the weights (taps, K, C), the bias (K,), `maps` maps of the result's size (to select by, to add) and
    `low` elements of a map to upsample, and writes `outs` maps (N, K, H, W).
    """
    k = k or x.c
    y = replace(x, c=k)
    elements = x.elements + taps * k * x.c + k * bias + (maps + outs) * y.elements + low
    return Work(conv_flops(x, k, taps), elements)


def weight_grad(x: Map, k: int | None = None, taps: int = 9) -> Work:
    """Reads x (N, C, H, W) and gy (N, K, H, W), writes (K, C, taps): as many operations as forward."""
    k = k or x.c
    return Work(conv_flops(x, k, taps), x.elements + replace(x, c=k).elements + taps * k * x.c)


def bias_grad(gy: Map) -> Work:
    """Reads gy (N, K, H, W), writes (K,)."""
    return Work(0, gy.elements + gy.c)


def pool(x: Map, argmax: bool = False) -> Work:
    """Reads x and writes y, both (N, C, H, W); a byte an element with argmax."""
    return Work(0, 2 * x.elements, x.elements * argmax)


def pool_backward(x: Map, add: bool = False) -> Work:
    """Reads gy and the argmax, and the running gradient where it is added; writes gx: all (N, C, H, W)."""
    return Work(0, (2 + add) * x.elements, x.elements)


def bilinear(y: Map, add: bool = False) -> Work:
    """Reads (N, C, h, w), and (N, C, H, W) to add it to; writes y (N, C, H, W)."""
    return Work(0, y.half_size.elements + (1 + add) * y.elements)


def bilinear_backward(gy: Map) -> Work:
    """Reads gy (N, C, H, W), writes (N, C, h, w)."""
    return Work(0, gy.elements + gy.half_size.elements)


def select(x: Map) -> Work:
    """ReLU's backward on its own: reads a gradient and x, writes a gradient: all (N, C, H, W)."""
    return Work(0, 3 * x.elements)


# ---- rows of the table -----------------------------------------------------------------------------------------------

FORWARD, TRAINING = "forward", "forward+backward"
# (channels, height, width) of a fusion's result -> channels of its low path: the network's deepest block is 512 wide.
LOW_CHANNELS = {(256, 32, 32): 512}


@dataclass(frozen=True)
class Row:
    """A kernel, or several that run one after another.

    measured: What is measured by a benchmark, and its direction; None if nothing measures just this.
    """

    name: str
    kernels: tuple[Work, ...]
    measured: tuple[str, str] | None = None


def kernel_rows(x: Map) -> list[Row]:
    """Every kernel with the ways in and out that the hot paths use, on x (N, C, H, W); as many channels out as in."""
    low = x.half_size.elements
    works = [
        ("conv3x3", conv(x), ("conv", FORWARD)),
        ("conv3x3 + bias", conv(x, bias=True), ("conv3x3", FORWARD)),
        ("RCU conv 1: relu(x), bias, ReLU", conv(x, bias=True), None),
        ("RCU conv 2: + x", conv(x, maps=1), None),
        ("RCU conv 2: + x, relu(y) too", conv(x, maps=1, outs=2), None),
        ("RCU dgrad 2: select", conv(x, maps=1), None),
        ("RCU dgrad 1: select, + gy", conv(x, maps=2), None),
        ("CRP last conv: + t1, relu(x)", conv(x, maps=2), None),
        ("fusion conv: + upsampled", conv(x, low=low), None),
        ("conv3x3_weight_grad", weight_grad(x), ("conv", "weight gradient")),
        ("bias_grad", bias_grad(x), None),
        ("maxpool5", pool(x), ("maxpool5", FORWARD)),
        ("maxpool5, argmax", pool(x, argmax=True), None),
        ("maxpool5 backward", pool_backward(x), None),
        ("maxpool5 backward + gradient", pool_backward(x, add=True), None),
        ("bilinear", bilinear(x), None),
        ("bilinear + map", bilinear(x, add=True), ("bilinear", FORWARD)),
        ("bilinear backward", bilinear_backward(x), None),
        ("CRP light: pool + 1x1 in one", conv(x, taps=1), None),
    ]
    stages = [
        Row("CRP light: pool, then 1x1", (pool(x), conv(x, taps=1))),
        Row("CRP stage: pool, then conv3x3", (pool(x), conv(x))),
    ]
    return [Row(name, (work,), measured) for name, work, measured in works] + stages


def path_rows(x: Map) -> list[Row]:
    """The hot paths, and what the kernels' benchmarks run for forward+backward, as `bench_*.py` has them."""
    paths = [
        ("conv3x3 + bias", "conv3x3", conv_training(x)),
        ("maxpool5", "maxpool5", [pool(x, argmax=True), pool_backward(x)]),
        ("bilinear + map", "bilinear", [bilinear(x, add=True), bilinear_backward(x)]),
    ]
    rows = [Row(f"{name}, fwd+bwd", tuple(works), (what, TRAINING)) for name, what, works in paths]
    hot = [("RCU", "rcu", rcu_forward(x), rcu_forward(x) + rcu_backward(x))]
    for (light, suffix, taps), n in product((("", "", 9), (" light", " 1x1", 1)), (2, 4)):
        training = crp_forward(x, n, taps) + crp_backward(x, n, taps)
        hot.append((f"CRP{light}, {n} stages", f"crp{n}{suffix}", crp_forward(x, n, taps), training))
    hot.append(("fusion, 2 paths", "fusion", fusion_forward(x), fusion_forward(x) + fusion_backward(x)))
    for name, what, forward, training in hot:
        rows.append(Row(f"{name}, forward", tuple(forward), (what, FORWARD)))
        rows.append(Row(f"{name}, fwd+bwd", tuple(training), (what, TRAINING)))
    return rows


def conv_training(x: Map) -> list[Work]:
    """Result, gradients in x, weights and bias."""
    return [conv(x, bias=True), conv(x), weight_grad(x), bias_grad(x)]


def rcu_forward(x: Map) -> list[Work]:
    """h = relu(conv(relu(x)) + b), y = conv(h) + x."""
    return [conv(x, bias=True), conv(x, maps=1)]


def rcu_backward(x: Map) -> list[Work]:
    """gh = select(conv_T(gy), h); gx = gy + select(conv_T(gh), x); two weight gradients, one bias gradient."""
    return [conv(x, maps=1), weight_grad(x), bias_grad(x), conv(x, maps=2), weight_grad(x)]


def crp_forward(x: Map, stages: int, taps: int = 9) -> list[Work]:
    """Pool and convolution of each stage; the last convolution adds relu(x) and the stages before it.

    One kernel a stage where the convolution is 1x1.
    """
    convs = [*[conv(x, taps=taps)] * (stages - 1), conv(x, taps=taps, maps=stages)]
    return convs if taps == 1 else [work for own in convs for work in (pool(x), own)]


def crp_backward(x: Map, stages: int, taps: int = 9) -> list[Work]:
    """Of each stage its pool again, the gradients in its convolution and (added to the running one) pool; relu(x)'s."""
    pools = [pool(x, argmax=True), pool_backward(x, add=True)]
    return [*pools, conv(x, taps=taps), weight_grad(x, taps=taps)] * stages + [select(x)]


def fusion_low(y: Map) -> Map:
    """What the low path reads, for a result y (N, K, H, W): (N, C, h, w)."""
    return replace(y.half_size, c=LOW_CHANNELS.get((y.c, y.h, y.w), y.c))


def fusion_forward(y: Map) -> list[Work]:
    """t = conv(low) at half the size, y = conv(high) + bilinear(t)."""
    return [conv(fusion_low(y), k=y.c), conv(y, low=y.half_size.elements)]


def fusion_backward(y: Map) -> list[Work]:
    """The gradient at half the size, then the two gradients of each convolution: its transpose maps K channels to C."""
    low = fusion_low(y)
    transposed = conv(y.half_size, k=low.c)
    return [bilinear_backward(y), conv(y), weight_grad(y), transposed, weight_grad(low, k=y.c)]


# ---- the floor -------------------------------------------------------------------------------------------------------


def times(work: Work, gpu: Gpu, dtype: str) -> tuple[float, float]:
    """(us of computing, us of moving): 1 TFLOP/s is 1e6 operations in a microsecond, 1 TB/s 1e6 bytes."""
    size = options.DTYPES[dtype].itemsize
    return work.flops / (gpu.tflops(dtype) * 1e6), work.nbytes(size) / (gpu.bandwidth * 1e6)


def floor(kernels: Sequence[Work], gpu: Gpu, dtype: str) -> tuple[float, float]:
    """(us, which part of them, 0 to 1, kernels take that computing bounds, not memory).

    The sum over kernels of max(computing, moving): the two overlap within a kernel, kernels do not.
    """
    both = [times(work, gpu, dtype) for work in kernels]
    total = sum(max(pair) for pair in both)
    return total, sum(computing for computing, moving in both if computing >= moving) / total


# ---- what was measured -----------------------------------------------------------------------------------------------

CONTENDERS = ("triton", "cuda", "vendor")  # vendor: the bare convolutions of ceilings.py
CEILING_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32"}
Label = tuple[str, str, str, str, str, str]  # device, what, direction, shape, dtype, contender
Measured = dict[Label, tuple[str, float]]  # -> date, us


def read_results(folder: Path) -> Measured:
    """The medians of all files in `folder`, of benchmarks, ceilings.py or run_all.py; of two the newer."""
    measured: Measured = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
        for section, row in walk(content):
            label = label_of(section, row)
            if label and row.get("median_ms"):
                measured[label] = max(measured.get(label, ("", 0.0)), (row.get("date") or "", row["median_ms"] * 1e3))
    return measured


def walk(content, section: str = "", meta=None) -> Iterator[tuple[str, dict]]:
    """(section, row) of a file: rows describe their run themselves, or the "meta" above them does."""
    if not isinstance(content, dict):
        return
    meta = content.get("meta") or meta or {}
    for row in content.get("rows") or ():
        yield section, {**meta, **row}
    for name, part in (content.get("sections") or {}).items():
        yield from walk(part, name, meta)


def label_of(section: str, row: dict) -> Label | None:
    """What a row times; None if nothing that the tables here have."""
    device = row.get("device_name", "")
    if "benchmark" in row and "shape" in row:
        what = row["benchmark"].removeprefix("bench_")
        what = crp_variant(row.get("command") or "") if what == "crp" else what
        return device, what, row["direction"], row["shape"], row["dtype"], row["contender"]
    match = re.fullmatch(r"(\d+)x(\d+)->(\d+) at (\d+)x(\d+)", str(row.get("case")))
    if section != "conv" or not match or match[2] != match[3] or row.get("dtype") not in CEILING_DTYPES:
        return None
    shape = "x".join(match.group(1, 2, 4, 5))
    return device, "conv", row["direction"], shape, CEILING_DTYPES[row["dtype"]], "vendor"


def crp_variant(command: str) -> str:
    """Such as "crp4 1x1", of `bench_crp.py --stages 4 --kernel 1`: of these, only its command tells rows apart."""
    asked = dict(re.findall(r"--(stages|kernel|order)[ =](\S+)", command))
    kernel, order = asked.get("kernel", "3"), asked.get("order", "pool-conv")
    suffixes = [f"{kernel}x{kernel}"] * (kernel != "3") + [order] * (order != "pool-conv")
    return " ".join([f"crp{asked.get('stages', 2)}", *suffixes])


def fastest(measured: Measured, gpu: Gpu, row: Row, x: Map, dtype: str) -> tuple[str, float] | None:
    """(contender, us) of the fastest of CONTENDERS that was measured."""
    if row.measured is None:
        return None
    labels = [(device, *row.measured, str(x), dtype, name) for device in gpu.devices for name in CONTENDERS]
    found = [(label[-1], measured[label][1]) for label in labels if label in measured]
    return min(found, key=lambda pair: pair[1]) if found else None


# ---- command line ----------------------------------------------------------------------------------------------------

SHAPES = (  # N, C, H, W: RefineNet's decoder on 512x512 images, in training and of a single image
    *((8, 256, side, side) for side in (128, 64, 32)),
    (8, 512, 16, 16),
    *((1, 256, side, side) for side in (64, 32)),
)
NOTES = f"""\
Floors: each tensor moves between memory and GPU once, and a kernel of a sum starts when the one before it ends. \
Kernels that multiply no matrices count no operations: memory bounds them. Launches, clocks that the power limit \
lowers, and weights packed anew at each call make real times longer; a tensor that is still in the L2 cache makes them \
shorter: a small map, or what one kernel of a hot path leaves to the next, where a time may be below the floor.
bound: what most of the floor is spent on, and how much of it where a sum has both.
measured: the fastest of {", ".join(CONTENDERS)} in benchmarks/results. at floor: the floor over that time."""


def sizes(text: str) -> list[tuple[int, int]]:
    """An argparse type: "128,96x160", side or height x width."""
    found = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) > 2 or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ArgumentTypeError(f"expected sizes such as 128 or 96x160, got {part!r}")
        found.append((int(numbers[0]), int(numbers[-1])))
    return found


def counts(text: str) -> list[int]:
    """An argparse type: "1,8"."""
    return [options.positive(int)(part) for part in text.split(",")]


def parse():
    parser = options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=options.names_from(GPUS), default=list(GPUS), help="A100,H100; default: all")
    parser.add_argument("--dtype", choices=options.DTYPES, default="bfloat16", help="float32 is multiplied as TF32")
    text = "replaces those of the default shapes"
    parser.add_argument("--batch", type=counts, help=f"1,8; {text}")
    parser.add_argument("--channels", type=counts, help=f"256,512; {text}")
    parser.add_argument("--size", type=sizes, help=f"128,96x160; {text}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measurements; benchmarks/results")
    parser.add_argument("--json", metavar="FILE", type=options.output_file, help="write every row to FILE")
    args = parser.parse_args()
    if not args.results.is_dir():
        parser.error(f"--results: {str(args.results)!r} is no folder")
    try:
        args.measured = read_results(args.results)
    except ValueError as error:
        parser.error(f"--results: {error}")
    return args


def shapes_of(args) -> list[Map]:
    """The default shapes, with what was asked for put in place of theirs, each once."""
    found: list[tuple[int, int, tuple[int, int]]] = []
    for n, c, h, w in SHAPES:
        found += product(args.batch or [n], args.channels or [c], args.size or [(h, w)])
    return [Map(n, c, h, w) for n, c, (h, w) in dict.fromkeys(found)]


def table_row(name: str, x: Map, row: Row, kind: str, args) -> dict:
    """A row as the JSON file has it."""
    gpu, size = GPUS[name], options.DTYPES[args.dtype].itemsize
    floor_us, computing = floor(row.kernels, gpu, args.dtype)
    contender, us = fastest(args.measured, gpu, row, x, args.dtype) or (None, None)
    return {
        "gpu": name,
        "shape": str(x),
        "dtype": args.dtype,
        "kind": kind,
        "name": row.name,
        "flops": sum(work.flops for work in row.kernels),
        "bytes": sum(work.nbytes(size) for work in row.kernels),
        "floor_us": floor_us,
        "bound": "compute" if computing >= 0.5 else "memory",
        "computing": computing,
        "contender": contender,
        "measured_us": us,
        "at_floor": us and floor_us / us,
    }


def show(console: Console, name: str, rows: list[dict]) -> None:
    """One table, 80 columns wide: a GPU and a shape."""
    gpu, dtype = GPUS[name], rows[0]["dtype"]
    peaks = f"{gpu.tflops(dtype):g} TFLOP/s, {gpu.bandwidth:g} TB/s"
    title = f"{name} SXM, {rows[0]['shape']}, {dtype}: {peaks}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("GFLOP", "MB", "floor\nµs", "bound", "measured\nµs", "at\nfloor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for before, row in zip([rows[0], *rows], rows):
        if row["kind"] != before["kind"]:
            table.add_row()
        table.add_row(row["name"], *cells(row))
    console.print(table)
    console.print()


def cells(row: dict) -> list[str]:
    mixed = 0 < row["computing"] < 1
    part = max(row["computing"], 1 - row["computing"])
    timed = row["measured_us"] is not None
    return [
        digits(row["flops"] / 1e9) if row["flops"] else "–",
        digits(row["bytes"] / 1e6),
        digits(row["floor_us"]),
        row["bound"] + (f" {part:.0%}" if mixed else ""),
        f"{row['contender']} {digits(row['measured_us'])}" if timed else "–",
        f"{row['at_floor']:.0%}" if timed else "–",
    ]


def digits(value: float) -> str:
    """Four digits, no exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 0.1 else f"{value:.3f}"


def main() -> int:
    args = parse()
    console, rows = Console(), []
    for name, x in product(args.gpu, shapes_of(args)):
        listed = [(row, "kernel") for row in kernel_rows(x)] + [(row, "path") for row in path_rows(x)]
        own = [table_row(name, x, row, kind, args) for row, kind in listed]
        show(console, name, own)
        rows += own
    console.print(NOTES, highlight=False)
    if args.json:
        options.write_json(args.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
