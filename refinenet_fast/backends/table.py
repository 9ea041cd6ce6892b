"""What runs a convolution, by device family: committed tables, and the user's own, made by :func:`refinenet_fast.tune`.

A table is a JSON file, ``<family>.json``, ``sm_90`` or ``avx2`` being families::

    {"family": "sm_90", "made": {...}, "rows": [
        {"kernel": "triton conv3x3", "dtype": "bfloat16", "shape": [8, 128, 128, 256, 256, 9], "choice": {...}}]}

with shapes (N, H, W, C, K, TAPS). The user's rows come first, then the nearest shape of the same kernel, dtype and TAPS
wins; nothing is timed here, so ranks, captured graphs and resumed runs that have the same tables agree. Committed ones
lie in the package's folder ``tables`` (``benchmarks/make_table.py`` makes a CPU's); the user's in
``REFINENET_FAST_TABLES``, by default ``~/.cache/refinenet_fast``. Where no row is near, a backend decides by the sizes
itself.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from refinenet_fast.files import whole

COMMITTED = Path(__file__).resolve().parents[1] / "tables"
FARTHEST = 2.0  # doublings, of all sizes together: beyond them a row says nothing about a shape
Choice = str | dict[str, Any]  # a backend's own: "vendor", a configuration, ...
Shape = tuple[int, int, int, int, int, int]  # N, H, W, C, K, TAPS


class Question(NamedTuple):
    """What a table is asked."""

    family: str
    kernel: str
    dtype: str
    shape: Shape


_asked: list[Question] | None = None  # while recorded


def lookup(question: Question) -> Choice | None:
    """The nearest row's choice; None where no row is near."""
    if _asked is not None:
        _asked.append(question)
    return _nearest(question)


@contextmanager
def recorded() -> Iterator[list[Question]]:
    """The questions asked within the block, in order."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def user_folder() -> Path | None:
    """Where the user's tables are; None for a user without a home."""
    if named := os.environ.get("REFINENET_FAST_TABLES"):
        return Path(named)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "refinenet_fast"
    try:
        return Path.home() / ".cache" / "refinenet_fast"
    except RuntimeError:
        return None


@functools.lru_cache(maxsize=4096)
def _nearest(question: Question) -> Choice | None:
    for rows in _tables(question.family):
        same = [r for r in rows if (r["kernel"], r["dtype"]) == question[1:3] and r["shape"][5] == question.shape[5]]
        best = min(same, key=lambda row: _distance(row["shape"], question.shape), default=None)
        if best is not None and _distance(best["shape"], question.shape) <= FARTHEST:
            return best["choice"]
    return None


def _distance(a: list[int], b: Shape) -> float:
    """In doublings of the pixels, of the tiles of 4x4 that cover them, of the width and of both channels."""

    def doublings(of: list[int] | Shape) -> list[float]:
        n, h, w, c, k, _ = of
        return [math.log2(size) for size in (n * h * w, n * -(-h // 4) * -(-w // 4), w, c, k)]

    return sum(abs(x - y) for x, y in zip(doublings(a), doublings(b), strict=True))


@functools.lru_cache(maxsize=16)
def _tables(family: str) -> list[list[dict[str, Any]]]:
    """Rows of the user's table, then of the committed one."""
    return [read(folder / f"{family}.json") for folder in (user_folder(), COMMITTED) if folder]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of one file; none, with a warning, where it is damaged or foreign."""
    try:
        content = json.loads(path.read_text())
        rows = content["rows"]
        if content["family"] != path.stem:
            raise ValueError(f"expected the table of {path.stem}, got that of {content['family']!r}")
        for row in rows:
            kernel, dtype, shape, choice = row["kernel"], row["dtype"], row["shape"], row["choice"]
            valid = isinstance(kernel, str) and isinstance(dtype, str) and isinstance(choice, str | dict)
            if not valid or len(shape) != 6 or not all(isinstance(s, int) and s > 0 for s in shape):
                raise ValueError(f"expected kernel, dtype, six positive sizes and a choice, got {row}")
        return rows
    except FileNotFoundError:
        return []
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # a cache that is broken must not stop anyone
        warnings.warn(f"{path} is not read: {error}; make it anew with refinenet_fast.tune, or delete it", stacklevel=2)
        return []


def write(family: str, rows: list[dict[str, Any]], made: dict[str, Any], folder: Path | None = None) -> Path:
    """Put rows into a table (by default the user's) beside those it has of other questions; sorted, in one step.

    Raises:
        OSError: It cannot be written; the old one is as it was.
    """
    folder = folder or user_folder()
    if folder is None:
        raise OSError("there is no home directory to keep a table in: set REFINENET_FAST_TABLES to a folder")
    path = folder / f"{family}.json"

    def question(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["kernel"], row["dtype"], *row["shape"]

    new = {question(row) for row in rows}
    kept = [row for row in read(path) if question(row) not in new]
    lines = ",\n".join(json.dumps(row) for row in sorted([*rows, *kept], key=question))
    content = f'{{"family": {json.dumps(family)}, "made": {json.dumps(made)}, "rows": [\n{lines}\n]}}\n'
    with whole(path) as file:
        file.write(content.encode())
    reload()
    return path


def reload() -> None:
    """Read the tables again where they are next asked."""
    _nearest.cache_clear()
    _tables.cache_clear()
