"""Correctness and benchmarks in one command and one JSON file: what to run on a machine once.

    python benchmarks/run_all.py --device cuda --json benchmarks/results/h100.json
    python benchmarks/run_all.py --sections correctness,crp --quick

Each section is a process of its own, so one that crashes or hangs costs the others nothing; what
it had measured by then is kept. The exit code is 1 if any of them failed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import options

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "correctness": "correctness.py",
    "ceilings": "ceilings.py",
    "crp": "bench_crp.py",
    "rcu": "bench_rcu.py",
    "fusion": "bench_fusion.py",
    "conv3x3": "bench_conv3x3.py",
    "maxpool5": "bench_maxpool5.py",
    "bilinear": "bench_bilinear.py",
    "overhead": "bench_overhead.py",
    "model": "bench_model.py",
    "train": "bench_train.py",
}


def parse():
    parser = options.Parser(
        description=__doc__.splitlines()[0],
        epilog="Any other option is handed on to the benchmarks: --dtype, --batch, --quick, ...",
    )
    options.add_machine_options(parser)
    sections, seconds = options.names_from(SECTIONS), options.positive(float)
    parser.add_argument("--sections", type=sections, default=list(SECTIONS), help="a,b,c")
    parser.add_argument("--seconds", type=seconds, help="budget of each section that has one")
    parser.add_argument("--limit", type=seconds, default=900, help="stop a section after this; 900")
    args, args.handed_on = parser.parse_known_args()
    _, meta = options.set_up_machine(parser, args)
    return args, meta


def command(name, args, result):
    """The command of one section, with the options that it knows."""
    options_ = ["--device", args.device, "--allocator", args.allocator, "--json", str(result)]
    if args.threads:
        options_ += ["--threads", str(args.threads)]
    if args.seconds and name not in ("correctness", "overhead"):
        options_ += ["--seconds", str(args.seconds)]
    if name == "train":
        options_ += ["--quick"] if "--quick" in args.handed_on else []
    elif name not in ("correctness", "ceilings", "overhead"):
        options_ += args.handed_on
    return [sys.executable, str(HERE / SECTIONS[name]), *options_]


def run_section(name, args, folder):
    """Runs one section; its exit code, duration and what it wrote, also where it was stopped."""
    result = Path(folder, f"{name}.json")
    start, error = time.monotonic(), None
    try:
        code = subprocess.run(command(name, args, result), timeout=args.limit).returncode
    except subprocess.TimeoutExpired:
        code, error = None, f"stopped after {args.limit:g} s"
    if code:
        error = f"exit code {code}"
    section = {"error": error, "seconds": round(time.monotonic() - start, 1)}
    if result.exists():
        section |= json.loads(result.read_text())
    return section


def main():
    args, meta = parse()
    content = {"meta": meta, "sections": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sections:
            print(f"\n== {name}", flush=True)
            content["sections"][name] = run_section(name, args, folder)
            if args.json:
                options.write_json(args.json, content)
    failed = {name: s["error"] for name, s in content["sections"].items() if s["error"]}
    for name, error in failed.items():
        print(f"{name}: {error}")
    print(f"{len(content['sections']) - len(failed)} of {len(content['sections'])} sections passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
