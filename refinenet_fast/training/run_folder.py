"""A run's folder: what lies where in it, whose it is, and its log."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinenet_fast.files import PARTIAL
from refinenet_fast.training.files import BadInput, read_json, write_json, write_whole
from refinenet_fast.training.model_file import BEST, LAST
from refinenet_fast.training.settings import FREE, TrainSettings

COLUMNS = ("step", "epoch", "loss", "lr", "seconds", "waited", "miou", "pixel_accuracy", "mean_accuracy")
# A run's own files while refinenet_fast.files.whole writes them.
_HALF_WRITTEN = re.compile(
    r"(settings\.json|log\.csv|(best|last)\.safetensors|checkpoints/step-\d+\.pt|previews/epoch-\d+\.png)"
    rf"\.\d+\.\d+{re.escape(PARTIAL)}"
)


@dataclass(frozen=True)
class RunFolder:
    """``settings.json``, ``log.csv``, ``checkpoints/``, ``previews/``, and the model files."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def events(self) -> Path:
        return self.path / "tensorboard"

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def last(self) -> Path:
        return self.path / LAST

    def holds_a_run(self) -> bool:
        return any(p.exists() for p in (self.settings, self.log, self.checkpoints, self.best, self.last))

    def check(self, settings: TrainSettings, resume: bool, overwrite: bool) -> None:
        """Raise where :meth:`claim` would not be right; nothing is written.

        Raises:
            BadInput: The folder holds a run, and neither ``resume`` nor ``overwrite`` is true; the run that is resumed
                has other settings, or lacks them.
        """
        if resume and overwrite:
            raise BadInput("resume: expected --resume or --overwrite, got both")
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"{self.path}: expected a folder, got a file")
        if self.holds_a_run() and not (overwrite or resume):
            raise BadInput(f"{self.path}: holds a run; --resume goes on with it, --overwrite replaces it")
        if resume and self.holds_a_run():
            if not self.settings.exists():
                raise BadInput(f"{self.settings}: expected the settings of the run that is resumed, there are none")
            self._check_same(settings)

    def claim(self, settings: TrainSettings, resume: bool, overwrite: bool) -> None:
        """Make the folder this run's, without what a killed run has left half-written; other files are the user's.

        Raises:
            BadInput: It cannot be written.
        """
        for partial in [*self.path.glob(f"*{PARTIAL}"), *self.path.glob(f"*/*{PARTIAL}")]:
            if _HALF_WRITTEN.fullmatch(partial.relative_to(self.path).as_posix()):
                partial.unlink()
        if resume and self.settings.exists():
            return
        if overwrite:
            self._clear()
        write_json(self.settings, settings.to_json())

    def _check_same(self, settings: TrainSettings) -> None:
        before = TrainSettings.from_json(read_json(self.settings)).to_json()
        for name, now in settings.to_json().items():
            if name not in FREE and _as_json(now) != _as_json(before[name]):
                raise BadInput(f"{name}: expected {before[name]!r}, as the run in {self.path} has, got {now!r}")

    def _clear(self) -> None:
        """Delete what a run writes, and nothing else."""
        for folder in (self.checkpoints, self.previews, self.events):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.settings, self.log, self.best, self.last):
            file.unlink(missing_ok=True)

    def write_log(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            BadInput: The disk is full, or it cannot be written.
        """
        try:
            with self.log.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise BadInput(f"{self.log}: cannot be written: {error.strerror}") from error

    def cut_log(self, step: int) -> None:
        """Drop the rows after ``step``, which a resumed run writes again, and a half-written one."""
        if not self.log.exists():
            return
        with self.log.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values() and row["step"].isdigit()]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= step)
        write_whole(self.log, lambda file: file.write(text.getvalue().encode()))


def _as_json(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
