"""Golden dumps: what the probe kernels leave in memory on real GPUs, one file for each architecture.

``benchmarks/golden_probe.py`` writes them. A dump is a compressed ``.npz``: under "<probe>/<position>", for every
position in the probe's ``outputs``, that argument's whole array as the kernel left it (a tensor map's: the array it
describes), from the arguments that ``default_rng(0)`` makes; and under "meta" what it ran on, as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emulator.tensormap import TensorMap
from probes.layouts import from_bf16

FOLDER = Path(__file__).resolve().parent / "probes" / "golden"
META = "meta"


def key(probe: str, position: int) -> str:
    """Of the argument at ``position``, in a dump."""
    return f"{probe}/{position}"


def outputs(name: str, positions: Sequence[int], arguments: Sequence[object]) -> dict[str, np.ndarray]:
    """What a dump keeps of a launch: the arrays, by key, at these positions of a probe's arguments."""
    found = {}
    for position in positions:
        argument = arguments[position]
        array = argument.array if isinstance(argument, TensorMap) else argument
        assert isinstance(array, np.ndarray), f"{name}: argument {position} is no array"
        found[key(name, position)] = array
    return found


def save(architecture: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Replaces the architecture's dump, in one step; returns its path. ``meta`` has to be JSON's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{architecture}.npz"
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{META: np.array(json.dumps(meta))}, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)
    return path


def load(architecture: str, folder: Path = FOLDER) -> dict[str, np.ndarray] | None:
    """The arrays of a dump, by key; None if the architecture ("sm_90") has none."""
    path = folder / f"{architecture}.npz"
    if not path.exists():
        return None
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != META}


def load_meta(architecture: str, folder: Path = FOLDER) -> dict[str, Any]:
    """What a dump was made on: device, driver, versions, commit, command."""
    with np.load(folder / f"{architecture}.npz") as file:
        return json.loads(str(file[META]))


def compare(output: np.ndarray, expected: np.ndarray, tolerance: float) -> tuple[bool, str]:
    """Whether an output is what a probe expects, and in words how near it comes.

    Args:
        expected: Of the output's dtype and shape, or in float64, where an output in uint16 is bfloat16.
        tolerance: Of the relative L2 error; 0: the same bits, but that one NaN is as good as another.
    """
    if output.shape != expected.shape:
        return False, f"shape {output.shape}, expected {expected.shape}"
    if output.dtype == expected.dtype and output.tobytes() == expected.tobytes():
        return True, "same bits"
    if output.dtype == np.uint16 and expected.dtype == np.float64:
        output = from_bf16(output)
    if tolerance:
        exact = output.astype(np.float64)
        size = float(np.linalg.norm(expected))
        error = float(np.linalg.norm(exact - expected)) / (size or 1.0)
        return error <= tolerance, f"error {error:.2g}, limit {tolerance:g}"
    if output.dtype == expected.dtype:
        # As bits, for 0.0 == -0.0.
        unsigned = f"u{output.itemsize}"
        same = np.ascontiguousarray(output).view(unsigned) == np.ascontiguousarray(expected).view(unsigned)
    else:
        same = output == expected
    same |= (output != output) & (expected != expected)  # two NaN
    if same.all():
        return True, "equal"
    at = tuple(int(i) for i in np.argwhere(~same)[0])
    got, want = (_word(array[at]) for array in (output, expected))
    return False, f"{int((~same).sum())} of {same.size} elements differ, first {list(at)}: {got}, expected {want}"


def _word(value: np.generic) -> str:
    return f"{int(value):#x}" if isinstance(value, np.unsignedinteger) else f"{value}"
