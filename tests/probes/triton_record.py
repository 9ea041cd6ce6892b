"""Keeps what a version of Triton makes of the probes, as PTX: test data for where another version is installed.

    python tests/probes/triton_record.py [folder]

needs Triton and NumPy, no GPU. It writes ``<name>-sm<arch>.ptx``, without debug sections and with bare file names, and
``metadata.json``, of each file what a launch needs to know; into ``triton-<version>`` beside it if no folder is named.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import triton  # noqa: E402

from probes.triton_probes import PROBES, compile_ptx, runs_with  # noqa: E402


def stripped(ptx: str) -> str:
    """Without debug sections (``.loc`` stays), with no folders in the names of files."""
    ptx = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{[^}]*\}\n?", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r'^(\s*\.file\s+\d+\s+)"(?:[^"]*/)?([^"/]*)".*$', r'\1"\2"', ptx, flags=re.MULTILINE)
    return ptx.rstrip() + "\n"


def record(folder: Path) -> dict[str, dict[str, Any]]:
    """Compile every probe; the metadata by file name without ``.ptx``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ptx"):
        old.unlink()
    recorded = {}
    for probe in PROBES:
        for arch in probe.archs if runs_with(probe, triton.__version__) else ():
            ptx, recorded[f"{probe.name}-sm{arch}"] = compile_ptx(probe, arch)
            (folder / f"{probe.name}-sm{arch}.ptx").write_text(stripped(ptx))
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(metadata)}" for name, metadata in sorted(recorded.items()))
    (folder / "metadata.json").write_text("{\n" + lines + "\n}\n")
    return recorded


def main() -> None:
    version = ".".join(triton.__version__.split(".")[:2])
    parser = argparse.ArgumentParser(description="Record the PTX that this version of Triton makes of the probes.")
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / f"triton-{version}", help="default: %(default)s")
    folder = parser.parse_args().folder
    recorded = record(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(recorded)} kernels of Triton {triton.__version__}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
