"""Small runs for the tests of training: generated images, a network that takes milliseconds."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refinenet_fast.training.samples import write_samples
from refinenet_fast.training.settings import TrainSettings

SIZE = (48, 64)


def samples(folder: Path, train: int = 5, val: int = 2) -> Path:
    """A generated data set."""
    write_samples(folder, train, val, SIZE)
    return folder


@contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """A file or folder that its owner may neither read nor write nor enter."""
    before = path.stat().st_mode
    path.chmod(0)
    try:
        yield
    finally:
        path.chmod(before)


def settings(data: Path, **options: Any) -> TrainSettings:
    """Of a run of a few seconds; timm's smallest ResNet, batches that do not come out even."""
    small = {
        "trunk": "test_resnet",
        "pretrained": False,
        "width": 8,
        "deep_width": 8,
        "dropout": 0.1,
        "crop": (40, 40),
        "epochs": 2,
        "batch": 2,
        "workers": 0,
        "device": "cpu",
        "log_every": 1,
        "lr": 0.005,
    }
    return TrainSettings(data, **{**small, **options})


def log(run: Path) -> list[dict[str, str]]:
    """The rows of a run's log."""
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    """Of every step that the run has logged."""
    return [float(row["loss"]) for row in log(run) if row["loss"]]


def train_quietly(wanted: TrainSettings, out: Path, resume: bool = False, environment: Any = None) -> None:
    """A run in a process of its own, on one thread; the environment is torchrun's for one of several ranks."""
    import os

    from refinenet_fast.training.loop import train

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    train(wanted, out, resume=resume)


def train_with_little_room(wanted: TrainSettings, out: Path, limit: int | None, said: Path) -> None:
    """A run that is expected to end for want of room, and the one line that it ends with.

    Args:
        limit: Bytes that a file may have from the third checkpoint on; None: the disk itself is small.
    """
    import resource

    from refinenet_fast.training import checkpoint
    from refinenet_fast.training.files import BadInput
    from refinenet_fast.training.loop import train

    saved = checkpoint.save

    def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
        if step == 3 and limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return saved(folder, step, state)

    checkpoint.save = save
    torch.set_num_threads(1)
    try:
        train(wanted, out)
    except BadInput as error:
        said.write_text(str(error))


def processes() -> Any:
    """Starts processes in which everything is imported, and no thread runs yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "refinenet_fast.training.loop", "training_runs"])
    return context
