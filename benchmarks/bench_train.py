"""A training step of a whole network: its time and its memory, against the same network in plain PyTorch.

python benchmarks/bench_train.py --networks refinenet50 --shapes 3x256 --batch 2 --json train.json

A step is forward, cross-entropy, backward and SGD with momentum; batch norm is frozen, dropout is on. ours-kept is
ours without `recompute_units`, ours-blocks ours with `checkpoint_blocks`. Memory is given three ways: what the decoder
saves between forward and backward and the peak of all tensors of a step, both counted exactly, and the peak that was
measured: the allocator's on a GPU; on a CPU the growth of the resident set in a process of its own.
"""

import json
import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

import cli
import machine
import options
from bench_model import CLASSES, NETWORKS, plain
from refinenet_fast import RefineNet
from refinenet_fast.testing import relative_l2
from refinenet_fast.training.memory import autocast, step_bytes
from timing import GaveUp, Timed, interleave, patience

OURS = {"ours": {}, "ours-kept": {"recompute_units": False}, "ours-blocks": {"checkpoint_blocks": True}}
CONTENDERS = ("eager", "compile", *OURS)
PATIENCE = 900  # seconds to compile
# Of all gradients together against eager's: a tie in a max pool that rounding decides otherwise outweighs the rest.
ALLOWED = {"float32": 5e-2, "bfloat16": 2e-1}


def network(name, contender, device):
    torch.manual_seed(0)
    made = RefineNet(CLASSES, freeze_bn=True, init="kaiming", **NETWORKS[name], **OURS.get(contender, {}))
    made = made.train().to(device, memory_format=torch.channels_last)
    return made if contender in OURS else plain(made)


class Step:
    """One training step of a contender, always on the same images; calling it gives the loss."""

    def __init__(self, name, contender, shape, dtype, device):
        self.network, self.dtype = network(name, contender, device), dtype
        self.run = torch.compile(self.network) if contender == "compile" else self.network
        self.optimizer = torch.optim.SGD(self.network.param_groups(lr=1e-5), momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(shape, generator=generator).to(device, memory_format=torch.channels_last)
        n, _, *size = shape
        self.labels = torch.randint(CLASSES, (n, *size), generator=generator).to(device)

    def __call__(self):
        with autocast(self.images.device.type, self.dtype):
            logits = self.run(self.images)
        loss = F.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def gradients(self):
        """Of the first step, in one vector."""
        torch.manual_seed(1)
        with autocast(self.images.device.type, self.dtype):
            logits = self.run(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        found = torch.cat([p.grad.flatten() for p in self.network.parameters() if p.requires_grad])
        self.optimizer.zero_grad()
        return found


# ---- memory ----------------------------------------------------------------------------------


def decoder_bytes(made, shape, dtype):
    """What the decoder saves for backward, beside its parameters and the trunk's maps."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage()._cdata] = t
        return t

    with FakeTensorMode(allow_non_fake_inputs=True), autocast("cpu", dtype):
        images = torch.empty(shape)
        with torch.no_grad():
            maps = made._features(0, made.scales[0], images, again=False)
        maps = [t.requires_grad_() for t in maps]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made._resize(made._decode([maps] * len(made.scales)), images)
        for t in (*made.parameters(), *made.buffers(), *maps):
            saved.pop(t.untyped_storage()._cdata, None)
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def counted(name, contender, shape, dtype):
    """Bytes, exact and the same on every machine; None for compiled code, which makes tensors of its own."""
    if contender == "compile":
        return {"decoder_saved_bytes": None, "step_bytes": None}
    made = network(name, contender, "cpu")
    # Blocks that are computed again save nothing in this sense.
    decoder = None if contender == "ours-blocks" else decoder_bytes(made, shape, dtype)
    return {"decoder_saved_bytes": decoder, "step_bytes": step_bytes(made, shape[0], shape[2:], dtype)}


def measured_peak(step, device):
    """Bytes of the second step, beside weights and the optimizer's state."""
    step()
    return machine.peak_memory(step, device)[0]


def child_peak(name, contender, shape, args):
    """`measured_peak` in a process of its own, where no other contender has touched memory."""
    asked = json.dumps({"name": name, "contender": contender, "shape": shape})
    command = [sys.executable, __file__, "--device", "cpu", "--dtype", args.dtype, "--measure", asked]
    command += ["--threads", str(torch.get_num_threads()), "--allocator", args.allocator]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


# ---- the cases -------------------------------------------------------------------------------


def measure(name, shape, args, device, say):
    """A row for each contender, all timed in turn."""
    truth, ready, rows = None, [], []
    for contender in args.contenders:
        row = {"network": name, "shape": "x".join(map(str, shape)), "dtype": args.dtype, "contender": contender}
        row |= counted(name, contender, shape, args.dtype) | {"problem": None}
        say(f"{name} {row['shape']}: {contender}")
        try:
            with patience(PATIENCE, "compiling it"):
                step = Step(name, contender, shape, args.dtype, device)
                found = step.gradients()
            truth = found if truth is None else truth
            row["error"] = relative_l2(found, truth)
            if row["error"] > ALLOWED[args.dtype]:
                row["problem"] = f"wrong: its gradients are {row['error']:.1e} from {args.contenders[0]}'s"
            elif device.type == "cuda":
                row["peak_memory_bytes"] = measured_peak(step, device)
            else:
                row["peak_memory_bytes"] = child_peak(name, contender, shape, args)
        except GaveUp as error:
            row["problem"] = str(error)
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if row["problem"] is None:
            ready.append((row, step))
        rows.append(row)
    say(f"{name}: timing all in turn")
    for (row, _), time_ms in zip(ready, interleave([Timed(step) for _, step in ready], device, args.seconds, 5)):
        row |= {"median_ms": time_ms.median_ms, "p20_ms": time_ms.p20_ms, "p80_ms": time_ms.p80_ms}
        row["rounds"] = time_ms.rounds
    return rows


def show(rows):
    table = Table(title="A training step; in brackets relative to the first", title_justify="left", box=None)
    headings = ("ms (20–80 %)", "decoder\nsaves MB", "tensors'\npeak MB", "measured\npeak MB", "error")
    for heading in ("", "contender", *headings):
        table.add_column(heading, no_wrap=True, justify="right" if heading in headings else "left")
    first = {}
    for row in rows:
        base = first.setdefault((row["network"], row["shape"]), row)
        cells = [row["problem"] or "–"]
        if row.get("median_ms"):
            share = row["median_ms"] / base["median_ms"] if base.get("median_ms") else 1
            cells = [f"{row['median_ms']:.0f} ({row['p20_ms']:.0f}–{row['p80_ms']:.0f}; {share:.2f})"]
        for key in ("decoder_saved_bytes", "step_bytes", "peak_memory_bytes"):
            value, of = row.get(key), base.get(key)
            cells.append("–" if value is None or not of else f"{value / 1e6:.0f} ({value / of:.2f})")
        table.add_row(f"{row['network']} {row['shape']}", row["contender"], *cells, f"{row.get('error') or 0:.1e}")
    Console(width=140).print(table)


def parse():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_machine_options(parser)
    parser.add_argument("--dtype", choices=tuple(ALLOWED), help="by autocast; float32, bfloat16 on a GPU")
    parser.add_argument("--networks", type=options.names_from(NETWORKS), help="a,b,c")
    parser.add_argument("--shapes", type=cli.shape_list, help="3x256,3x360x480")
    parser.add_argument("--batch", type=cli.batch_list, help="images of a step; default: 2, on a GPU 8")
    parser.add_argument("--contenders", type=options.names_from(CONTENDERS), help="a,b,c; eager first if it is named")
    parser.add_argument("--seconds", type=options.positive(float), default=60, help="for timing each network; 60")
    parser.add_argument("--quick", action="store_true", help="a tiny network, no compile: a smoke test")
    parser.add_argument("--measure", type=json.loads, help=options.argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.networks = args.networks or (["tiny"] if args.quick else ["refinenet50"])
    args.shapes = args.shapes or [(3, 64, 48) if args.quick else (3, 512, 512) if cuda else (3, 256, 256)]
    args.batch = args.batch or [8 if cuda and not args.quick else 2]
    args.contenders = args.contenders or [name for name in CONTENDERS if name != "compile" or not args.quick]
    args.seconds = 1 if args.quick else args.seconds
    return args, *options.set_up_machine(parser, args)


def main():
    args, device, meta = parse()
    if args.measure:
        name, contender, shape = args.measure["name"], args.measure["contender"], args.measure["shape"]
        print(json.dumps(measured_peak(Step(name, contender, shape, args.dtype, device), device)))
        return 0
    rows = []
    for name in args.networks:
        for shape in ((n, *size) for n in args.batch for size in args.shapes):
            found = measure(name, shape, args, device, say=partial(print, file=sys.stderr, flush=True))
            rows += [{"benchmark": "bench_train", **meta, **row} for row in found]
            if args.json:
                options.write_json(args.json, {"rows": rows})
    show(rows)
    return int(any(row["problem"] and row["contender"] in OURS for row in rows))


if __name__ == "__main__":
    sys.exit(main())
