"""Small runs for the tests of training: generated images, a network that takes milliseconds; what they have left."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from refinenet_fast import use_backend
from refinenet_fast.training import checkpoint
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


def train_quietly(wanted: TrainSettings, out: Path) -> None:
    """A run in a process of its own, on one thread."""
    from refinenet_fast.training.loop import train

    torch.set_num_threads(1)
    train(wanted, out)


def train_until_killed(wanted: TrainSettings, out: Path, after: int, share: float) -> None:
    """A run in a process of its own that SIGKILL ends, some time after a step's checkpoint is there.

    The signal comes from within, and the time is a share of the run's own shortest step: a busy machine does not let
    the run end before.

    Args:
        after: The step, from the second on (the first takes longer); or 0: when the run has settings and no checkpoint.
        share: Of a step, or of a tenth of a second.
    """

    def newest() -> str:
        return max((file.name for file in (out / "checkpoints").glob("step-*.pt")), default="")

    def kill() -> None:
        while not (out / "settings.json").exists() or (after and newest() < f"step-{after:08d}.pt"):
            time.sleep(0.001)
        seconds = 0.1
        if after:
            seconds = min(float(row["seconds"]) for row in log(out) if row["loss"] and int(row["step"]) <= after)
        time.sleep(share * seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    train_quietly(wanted, out)


def on_ranks(folder: Path, work: Callable[..., Any], *arguments: tuple[Any, ...], backend: str = "auto") -> list[Any]:
    """What ``work`` returns for each of ``arguments``, each in a process that is a rank as torchrun starts it.

    Args:
        folder: For what it returns: tensors and plain values.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, given in enumerate(arguments):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments))}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(len(arguments))}
        all_given = (environment, backend, folder / f"rank-{rank}.pt", work, given)
        ranks.append(processes().Process(target=_as_rank, args=all_given))
        ranks[-1].start()
    for process in ranks:
        process.join(240)
        process.kill()  # if it waits for one that has ended
    assert [process.exitcode for process in ranks] == [0] * len(ranks)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(len(ranks))]


def _as_rank(environment: dict[str, str], backend: str, result: Path, work: Callable[..., Any], given: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with use_backend(backend):
        torch.save(work(*given), result)


def train_as_rank(wanted: TrainSettings, out: Path, resume: bool = False, stop_at: int = 0) -> dict[str, Any]:
    """What a run says and ends with, on one rank.

    Args:
        stop_at: The step at whose checkpoint every rank stops, before it is written.
    """
    from refinenet_fast.training import loop
    from refinenet_fast.training.files import BadInput

    said: list[str] = []
    found: dict[str, Any] = {"said": said, "error": None}

    class Observed(loop.Trainer):
        def _save(self) -> None:
            if self.step == stop_at:
                raise KeyboardInterrupt
            super()._save()
            average = self.average.state_dict() if self.average is not None else {}
            found.update(model=self.model.state_dict(), average=average)

    loop.Trainer = Observed
    torch.compile = partial(torch.compile, backend="aot_eager")  # Inductor takes a minute for the same graphs
    try:
        loop.train(wanted, out, resume=resume, say=said.append)
    except BadInput as error:
        found["error"] = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        pass
    return found


def scan_as_rank(wanted: TrainSettings) -> dict[str, Any]:
    """The images that one rank reads to find what there is in the data, and what it is told of it."""
    from refinenet_fast.training.data import Split
    from refinenet_fast.training.distributed import ranks
    from refinenet_fast.training.files import BadInput
    from refinenet_fast.training.loop import without_bars
    from refinenet_fast.training.prepare import open_data

    seen: list[str] = []
    read = Split.read

    def noted(split: Split, index: int) -> Any:
        seen.append(str(split.images[index]))
        return read(split, index)

    Split.read = noted
    with ranks("cpu") as group:
        try:
            surveys = open_data(wanted, group, without_bars).surveys
        except BadInput as error:
            return {"seen": seen, "error": f"{type(error).__name__}: {error}"}
    found = {name: (survey.pixels, dict(survey.sizes)) for name, survey in surveys.items()}
    return {"seen": seen, "error": None, "found": found}


def train_with_little_room(wanted: TrainSettings, out: Path, limit: int | None, said: Path) -> None:
    """A run that is expected to end for want of room, and the one line that it ends with.

    Args:
        limit: Bytes that a file may have from the third checkpoint on; None: the disk itself is small.
    """
    import resource

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


def log(run: Path) -> list[dict[str, str]]:
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in log(run) if row["loss"]]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def assert_same_ends(one: Path, other: Path) -> None:
    """Of two runs: the losses of every step, the last checkpoint, and the network."""
    assert losses(one) == losses(other)
    ours, theirs = (checkpoint.load_newest(run / "checkpoints", print) for run in (one, other))
    for state in (ours, theirs):  # each process begins with other numbers of Python's and NumPy's; a run takes none
        state["random"] = [states["torch"] for states in state["random"]]
    different = differences(ours, theirs)
    assert not different, different
    assert_same_weights(one, other)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two checkpoints differ."""
    if isinstance(one, dict):
        keys = one.keys() | other.keys()
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        return [d for k, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{where}/{k}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]
