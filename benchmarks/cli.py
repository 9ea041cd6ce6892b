"""`python benchmarks/bench_*.py`: options, the loop over the cases, and the same under pytest."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import contenders
import harness
import options
import peers
import report

# (channels, height, width): the decoder's maps for a 512x512 image, from 1/4 to 1/32 resolution.
SHAPES = ((256, 128, 128), (256, 64, 64), (256, 32, 32), (512, 16, 16))
QUICK = ((16, 16, 16), (8, 13, 9))


def shape_list(text):
    """An argparse type: "256x128,512x30x40", channels x side or channels x height x width."""
    shapes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise argparse.ArgumentTypeError(f"expected shapes such as 256x128, got {part!r}")
        channels, height, width = (*map(int, numbers), int(numbers[-1]))[:3]
        shapes.append((channels, height, width))
    return shapes


def batch_list(text):
    """An argparse type: "1,8"."""
    return [options.positive(int)(part) for part in text.split(",")]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a bench_*.py file defines."""

    title: str
    cases: Callable  # args -> the harness.Case of each of args.batch and args.shapes
    shapes: Sequence[tuple[int, int, int]] = SHAPES
    quick: Sequence[tuple[int, int, int]] = QUICK
    add_options: Callable = lambda parser: None  # more options than all benchmarks have


def make_parser(spec):
    parser = options.Parser(description=spec.title)
    spec.add_options(parser)
    options.add_machine_options(parser)
    seconds = options.positive(float)
    parser.add_argument("--dtype", choices=options.DTYPES, help="float32; bfloat16 on a GPU")
    parser.add_argument("--seconds", type=seconds, help="time budget in all; default: 90")
    names = options.names_from(contenders.known())
    parser.add_argument("--contenders", type=names, help="a,b,c; default: all that can run")
    libraries = options.names_from(peers.PACKAGES)
    parser.add_argument("--peers", type=libraries, default=[], help=f"{','.join(peers.PACKAGES)}: on a CPU, forward")
    parser.add_argument("--shapes", type=shape_list, help="256x128,512x30x40: channels x size")
    parser.add_argument("--batch", type=batch_list, help="1,8; default: 1, on a GPU 1,8")
    directions = options.names_from(harness.DIRECTIONS)
    parser.add_argument("--directions", type=directions, default=harness.DIRECTIONS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no compile: a smoke test")
    parser.add_argument("--plot", metavar="FILE.png", type=options.output_file, help="a bar chart")
    return parser


def fill_in(args, spec):
    """Defaults that depend on other options."""
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.shapes = args.shapes or list(spec.quick if args.quick else spec.shapes)
    args.batch = args.batch or ([1, 8] if cuda and not args.quick else [1])
    args.seconds = args.seconds or (5 if args.quick else 90)
    return args


def choose(args, device, warn=lambda text: None):
    """The contenders asked for, or all that can run, with the reason for each that cannot; then the peers.

    Raises:
        ValueError: A contender that was asked for cannot run, or a peer is not installed; says why.
    """
    dtype = options.DTYPES[args.dtype]
    return [*_contenders(args, device, dtype, warn), *peers.choose(args.peers, device, dtype, warn)]


def _contenders(args, device, dtype, warn):
    reasons = {name: contenders.cannot_run(name, device, dtype) for name in contenders.known()}
    if args.contenders:
        for name in args.contenders:
            if reasons[name]:
                raise ValueError(f"contender {name} cannot run here: {reasons[name]}")
        return list(map(contenders.contender, args.contenders))
    if args.quick:
        reasons["compile"] = "takes too long for --quick"
    for name, reason in reasons.items():
        if reason:
            warn(f"without {name}: {reason}")
    return [contenders.contender(name) for name, reason in reasons.items() if not reason]


def main(spec):
    """Runs a benchmark; returns the exit code, 1 where a contender of ours is wrong or fails."""
    parser = make_parser(spec)
    args = fill_in(parser.parse_args(), spec)
    if args.plot and not report.can_plot():
        parser.error("--plot needs matplotlib: python -m pip install 'refinenet_fast[bench]'")
    device, meta = options.set_up_machine(parser, args)
    try:
        rivals = choose(args, device, warn=lambda text: print(text, file=sys.stderr))
    except ValueError as error:
        parser.error(str(error))
    cases = spec.cases(args)
    rows = []
    benchmark = {"benchmark": Path(sys.argv[0]).stem, **meta}
    steps = [(case, direction) for case in cases for direction in args.directions]
    for found in run(steps, options.DTYPES[args.dtype], device, rivals, args.seconds):
        rows += [benchmark | row for row in found]
        if args.json:  # after each case, so a run that is cut off keeps what it measured
            options.write_json(args.json, {"rows": rows})
    report.show(spec.title, rows, cases[0].unit)
    if args.plot:
        report.plot(args.plot, spec.title, rows)
    ours = {rival.name for rival in rivals if rival.ours}
    return int(any(row["problem"] and row["contender"] in ours for row in rows))


def run(steps, dtype, device, rivals, seconds):
    """Yields the rows of each (case, direction), sharing out what is left of `seconds`."""
    end = time.monotonic() + seconds
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(*columns, text, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(steps))

        def say(what):
            progress.update(task, description=what)
            if not console.is_terminal:  # a log file has no use for a bar
                print(what, file=sys.stderr, flush=True)

        for k, (case, direction) in enumerate(steps):
            share = (end - time.monotonic()) / (len(steps) - k)
            times = (share, seconds / 60)
            yield harness.measure(case, dtype, device, direction, rivals, times, say)
            progress.advance(task)


# ---- pytest benchmarks --benchmark-only -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One case, direction and contender, to be run by pytest-benchmark."""

    case: harness.Case
    direction: str
    contender: contenders.Contender
    dtype: torch.dtype
    device: torch.device
    meta: dict

    def __str__(self):
        return f"{self.case.name}-{self.direction}-{self.contender.name}"

    def __call__(self, benchmark):
        what = benchmark.name.partition("[")[0]
        benchmark.group = f"{what} {self.case.name} {self.direction}"
        inputs = harness.inputs_of(self.case, self.dtype, self.device)
        entry = harness.prepare(self.case, inputs, self.direction, self.contender)
        assert entry.problem is None, entry.problem
        benchmark.extra_info.update(self.meta | entry.fields())

        def call():
            entry.run.call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        with entry.run.context():
            benchmark(call)


def measurements(spec, quick):
    """What conftest.py parametrises a test_* function with: the defaults of the command line."""
    parser = make_parser(spec)
    args = fill_in(parser.parse_args(["--quick"] if quick else []), spec)
    device, meta = options.set_up_machine(parser, args)
    return [
        Measurement(case, direction, rival, options.DTYPES[args.dtype], device, meta)
        for case in spec.cases(args)
        for direction in harness.DIRECTIONS
        for rival in choose(args, device)
    ]
