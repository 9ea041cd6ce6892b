"""Checkpoints: written whole, the two newest kept, read without running any code that is in them."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refinenet_fast.backends import table
from refinenet_fast.training.files import BadInput, first_line, write_whole

KEPT = 2  # the second newest is there in case the disk, not the process, damages the newest
_NAME = re.compile(r"step-(\d+)\.pt")


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-<step>.pt`` and then delete all but the newest two.

    Raises:
        BadInput: The disk is full, or it cannot be written; those before it are as they were.
    """
    path = path_of(folder, step)
    content = io.BytesIO()  # torch.save makes an anonymous RuntimeError of a full disk
    torch.save({"step": step, **state}, content)
    write_whole(path, lambda file: file.write(content.getbuffer()))
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()
    return path


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint that is written after so many steps."""
    return folder / f"step-{step:08d}.pt"


def load_newest(folder: Path, warn: Callable[[str], object]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where there is none at all.

    Raises:
        BadInput: There are some, and none can be read.
    """
    problem = ""
    for path in _newest_first(folder):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            problem = f"{path}: expected a checkpoint, got {first_line(error)}"
            warn(f"{problem}; the one before it is taken")
    if problem:
        raise BadInput(problem)
    return None


def _newest_first(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(named, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def random_state() -> dict[str, Any]:
    """Every state that random numbers come from: Python's, NumPy's, PyTorch's on the CPU and on this process's GPU."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)).to(torch.int64), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """What :func:`random_state` gave; a GPU's, where there is one."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def tables_hash() -> str:
    """Of every table that decides what runs a convolution: with others, a resumed run rounds differently."""
    digest = hashlib.sha256()
    for folder in (table.COMMITTED, table.user_folder()):
        for file in sorted(folder.glob("*.json")) if folder else ():
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
