"""The committed table that `auto` reads on processors of this machine's kind, and a check of its answers.

python benchmarks/make_table.py                # refinenet_fast/tables/<instruction set>.json, in ten minutes
python benchmarks/make_table.py --check 100    # 100 random shapes: what the table chose against the vendor's

Nothing else may run meanwhile. It may be stopped: what was measured is kept and not measured again.
"""

import math
import random
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import options
from refinenet_fast import _native, tuning
from refinenet_fast.backends import engine, table
from refinenet_fast.backends.table import COMMITTED, Question

CHANNELS = (8, 16, 32, 64, 128, 256, 512, 2048)
MOST_UNLIKE = 4  # times as many channels on one side as on the other; 2048 goes with 512 and 256 as well
SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 24, 33, 64, 128)
KERNELS = (("cpu conv3x3", 9), ("cpu conv3x3", 1), ("cpu weight_grad", 9))
MOST_FLOPS = {"float32": 4e10, "bfloat16": 2e9}  # of one call; without bfloat16 in hardware the vendor's is slow
CLEARLY = 1.05  # times as long as the best the vendor's may take and still be chosen: neighbours differ by as much
KEEP = 20  # rows between two writes


def questions(dtype):
    """Every Question of the grid, a square map each."""
    for kernel, taps in KERNELS:
        for c in CHANNELS:
            for k in CHANNELS:
                if max(c, k) > MOST_UNLIKE * min(c, k) and (max(c, k), min(c, k)) != (2048, 256):
                    continue
                for side in SIDES:
                    if 2 * side * side * c * k * taps <= MOST_FLOPS[dtype]:
                        yield Question(_native._C.cpu_isa(), kernel, dtype, (1, side, side, c, k, taps))


def made(meta):
    """How the rows can be had again; without what says nothing about a CPU."""
    return {key: value for key, value in meta.items() if value is not None and key != "device"}


def decided(row):
    """The vendor's unless another is clearly faster; times to three digits."""
    ms = {name: float(f"{time:.3g}") for name, time in row["ms"].items()}
    return row | {"ms": ms} | ({"choice": "vendor"} if ms["vendor"] <= CLEARLY * min(ms.values()) else {})


def make(dtypes, meta, folder):
    family = _native._C.cpu_isa()
    known = {(r["kernel"], r["dtype"], *r["shape"]) for r in table.read(folder / f"{family}.json")}
    asked = [q for dtype in dtypes for q in questions(dtype) if (q.kernel, q.dtype, *q.shape) not in known]
    rows = []
    for n, question in enumerate(track(asked, "measuring", console=Console(stderr=True)), 1):
        row = tuning.measure(question, torch.device("cpu"))
        if row is not None:
            rows.append(decided(row))
        if n % KEEP == 0 or n == len(asked):
            table.write(family, rows, made(meta), folder)
            rows = []


def random_question(generator, dtype):
    """One that a network might ask: any channels, any map, one to eight images."""
    kernel, taps = generator.choice(KERNELS)
    while True:
        c, k = (round(2 ** generator.uniform(3, 11)) for _ in range(2))
        h, w = (round(2 ** generator.uniform(0, 7.5)) for _ in range(2))
        n = generator.choice((1, 1, 1, 2, 8))
        if 2 * n * h * w * c * k * taps <= MOST_FLOPS[dtype]:
            return Question(_native._C.cpu_isa(), kernel, dtype, (n, h, w, c, k, taps))


def chosen(question):
    """What the engine's rule and the tables together answer."""
    n, h, w, c, k, taps = question.shape
    side = math.isqrt(taps)
    x, weight = (
        torch.empty(*shape, dtype=getattr(torch, question.dtype)) for shape in ((n, c, h, w), (k, c, side, side))
    )
    pays = engine.gradient_pays if question.kernel == "cpu weight_grad" else engine.pays
    return engine.NAMES[taps] if pays(x, weight) else "vendor"


def check(count, dtype, seed):
    """Rows of the shapes asked, the worst last: time of the choice over the vendor's and over the best."""
    generator, found = random.Random(seed), []
    for _ in track(range(count), "checking", console=Console(stderr=True)):
        question = random_question(generator, dtype)
        row = tuning.measure(question, torch.device("cpu"))
        ms, choice = row["ms"], chosen(question)
        found.append((ms[choice] / ms["vendor"], ms[choice] / min(ms.values()), choice, ms["vendor"], question))
    for against_vendor, against_best, choice, ms, question in sorted(found, key=lambda row: row[:2])[-20:]:
        what = f"{question.kernel} {question.dtype} {list(question.shape)}"
        print(f"{against_vendor:5.2f} x vendor {against_best:5.2f} x best  {choice:8} vendor {ms:8.3f} ms  {what}")
    slower = [row for row in found if row[0] > 1.1]
    print(f"{len(slower)} of {count} chosen more than 10 % slower than the vendor's")
    return int(bool(slower))


def main():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_process_options(parser)
    parser.add_argument("--dtypes", type=options.names_from(MOST_FLOPS), default=["float32"], help="float32,bfloat16")
    parser.add_argument("--folder", type=Path, default=COMMITTED, help="of the table")
    parser.add_argument(
        "--check", metavar="N", type=options.positive(int), help="measure N random shapes, write nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --check")
    args = parser.parse_args()
    args.device = "cpu"
    _, meta = options.set_up_machine(parser, args)
    torch.manual_seed(0)
    if args.check:
        return max(check(args.check, dtype, args.seed) for dtype in args.dtypes)
    return make(args.dtypes, meta, args.folder)


if __name__ == "__main__":
    sys.exit(main())
