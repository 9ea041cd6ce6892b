"""The CUDA kernels' tests under NVIDIA's compute-sanitizer: memcheck, racecheck, synccheck. Needs a GPU.

    python benchmarks/gpu_sanitizers.py --json benchmarks/results/h100_sanitizers.json
    python benchmarks/gpu_sanitizers.py --tools racecheck tests/test_cuda_conv3x3.py -k sm90a

Each tool runs pytest on the tests that a GPU runs, of every policy at small sizes, in a process of its own; it looks at
this package's kernels alone. PyTorch's cache of memory is off, so that every tensor ends where its allocation does.
What a tool says is in FILE, to be triaged. Exits with 1 if one found something or did not get to its end, or if a test
failed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import machine
import options

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # the exit code of a tool that found something: none of pytest's
KERNELS = "kernel_substring=refinenet_fast"  # in mangled names
# Not what takes 20 GB, nor what Inductor compiles.
TESTS = ("tests/test_gpu.py", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_cuda_*.py")))
LEFT_OUT = "not compiled and not more_elements"
MOST_LINES = 2000
SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)")


def parse():
    parser = options.Parser(description=__doc__.partition("\n")[0], epilog="Any other option is pytest's.")
    parser.add_argument("--tools", type=options.names_from(TOOLS), default=list(TOOLS), help="a,b,c")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="its command, if it is not on the PATH")
    parser.add_argument("--limit", type=options.positive(float), default=7200, help="seconds for each tool; 7200")
    parser.add_argument("--json", metavar="FILE", type=options.output_file, help="what the tools found")
    args, args.pytest = parser.parse_known_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use")
    if shutil.which(args.sanitizer) is None:
        parser.error(f"{args.sanitizer} was not found: it is part of the CUDA toolkit")
    return args


def command(tool, args):
    named = any(word.startswith("tests") for word in args.pytest)
    tests = args.pytest if named else [*TESTS, "-k", LEFT_OUT, *args.pytest]
    checks = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", KERNELS, "--report-api-errors", "no"]
    return [args.sanitizer, *checks, sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:xdist", *tests]


def findings(text):
    """What the tool itself said, without its banner; its summary's number of errors or hazards; pytest's last line."""
    said, others = [], [""]
    for line in filter(str.strip, text.splitlines()):
        is_tools = line.startswith("========= ") and not line.endswith("=")  # pytest's rules go on to the end
        (said if is_tools else others).append(line.removeprefix("========= ") if is_tools else line)
    summaries = SUMMARY.findall(text)
    return said[1 : MOST_LINES + 1], int(summaries[-1]) if summaries else None, others[-1]


def run_tool(tool, args):
    """Runs one tool; what is wrong, what it said, and pytest's last line."""
    start, error = time.monotonic(), None
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command(tool, args), cwd=ROOT, env=environment, timeout=args.limit, text=True, **pipes)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code, text = None, (stopped.stdout or b"").decode(errors="replace")
    said, count, last = findings(text)
    if code is None:
        error = f"stopped after {args.limit:g} s"
    elif code == FOUND or count:
        error = f"found {count}"
    elif code or count is None:
        error = f"exit code {code}, {'no' if count is None else 'a'} summary"
    seconds = round(time.monotonic() - start, 1)
    found = {"tool": tool, "error": error, "found": count, "exit_code": code, "seconds": seconds}
    return {**found, "pytest": last, "said": said}


def main():
    args = parse()
    content = {"meta": machine.describe(torch.device("cuda:0"), "default"), "tools": []}
    for tool in args.tools:
        found = run_tool(tool, args)
        print(f"{tool}: {found['error'] or 'nothing found'}; {found['pytest']}", flush=True)
        content["tools"].append(found)
        if args.json:
            options.write_json(args.json, content)
    return int(any(found["error"] for found in content["tools"]))


if __name__ == "__main__":
    sys.exit(main())
