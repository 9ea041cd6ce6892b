"""What a call of each hot path costs before any kernel computes: host microseconds on a map too small to matter.

python benchmarks/bench_overhead.py [--device cuda] [--json overhead.json]

On a GPU only the time to enqueue is taken, since nothing waits for the device; on a CPU the whole call. Beside each of
our backends stands the same in plain PyTorch.
"""

import contextlib
import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

import options
import timing
from refinenet_fast import backends, testing

SHAPE = (1, 16, 8, 8)
CALLS, ROUNDS = 20, 15


def calls(data):
    """The hot paths with their usual options."""
    low = (1, 16, 4, 4)
    return {
        "rcu": testing.rcu_call(SHAPE, data),
        "run of 2 rcus": testing.rcu_call(SHAPE, data, units=2),
        "fusion, 2 paths": testing.fuse_call([SHAPE, low], data, [3, 3], 16),
        "crp, 2 stages": testing.crp_call(SHAPE, data),
        "crp, 4 stages": testing.crp_call(SHAPE, data, stages=4),
        "crp, 4 stages, 1x1": testing.crp_call(SHAPE, data, stages=4, kernel=1),
    }


def contenders(call, device, dtype):
    """(name, forward, forward + backward) of PyTorch and of every backend that runs here."""
    tensors = [None if t is None else t.requires_grad_() for t in call.tensors]
    given = [t for t in tensors if t is not None]

    def plain():
        return testing.eager(call, *tensors)

    def ours(name):
        op = getattr(torch.ops.refinenet_fast, call.op)
        return lambda: op(tensors, *call.options, name)

    found = {"eager": plain}
    for info in backends.list_backends():
        if info.available and backends.get(info.name).can_run(device, dtype) is None:
            found[info.name] = ours(info.name)
    gy = torch.ones_like(plain())
    return [
        (name, forward, lambda forward=forward: torch.autograd.grad(forward(), given, gy))
        for name, forward in found.items()
    ]


def microseconds(runs, device):
    """Median host time of each run, in turn."""
    times = [[] for _ in runs]
    for round_ in range(ROUNDS + 2):
        for run, mine in zip(runs, times):
            timing.synchronize(device)
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            spent = time.perf_counter() - start
            if round_ >= 2:
                mine.append(1e6 * spent / CALLS)
    timing.synchronize(device)
    return [statistics.median(mine) for mine in times]


def measure(device, dtype, meta):
    rows = []
    for path, call in calls(testing.Data(dtype, str(device))).items():
        found = contenders(call, device, dtype)
        for direction, index, context in (
            ("forward", 1, torch.inference_mode),
            ("training", 2, contextlib.nullcontext),
        ):
            with context():
                spent = microseconds([c[index] for c in found], device)
            rows += [
                {**meta, "path": path, "direction": direction, "contender": name, "host_us": us}
                for (name, *_), us in zip(found, spent)
            ]
    return rows


def show(rows):
    names = list(dict.fromkeys(row["contender"] for row in rows))
    table = Table(title="Host microseconds a call", title_justify="left", box=None)
    for heading in ("", "", *names):
        table.add_column(heading, justify="right" if heading else "left")
    for path, direction in dict.fromkeys((row["path"], row["direction"]) for row in rows):
        spent = {r["contender"]: r["host_us"] for r in rows if (r["path"], r["direction"]) == (path, direction)}
        table.add_row(path, direction, *(f"{spent[name]:.0f}" for name in names))
    Console().print(table)


def main():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_machine_options(parser)
    parser.add_argument("--dtype", choices=options.DTYPES, default="float32")
    args = parser.parse_args()
    device, meta = options.set_up_machine(parser, args)
    rows = measure(device, options.DTYPES[args.dtype], {**meta, "dtype": args.dtype})
    show(rows)
    if args.json:
        options.write_json(args.json, {"meta": meta, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
