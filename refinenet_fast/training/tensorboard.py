"""A run's log for TensorBoard, beside its CSV (the extra ``tensorboard``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from refinenet_fast.training.files import BadInput, unwritable

FLUSH_SECONDS = 10


class Events:
    """Scalars and pictures of one run.

    Args:
        folder: Of its event files.
        step: The last step that was done: what an interrupted run has written after it is no longer shown.

    Raises:
        BadInput: TensorBoard is not installed, or ``folder`` cannot be written; the methods, the latter.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.hook, threading.excepthook = threading.excepthook, self._of_a_thread
        with self._writes():
            self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._writes():
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(
        self,
        step: int,
        pixels: np.ndarray,  # (H, W, 3) uint8
    ) -> None:
        with self._writes():
            self.writer.add_image("input, truth, prediction", pixels, step, dataformats="HWC")

    def close(self) -> None:
        with self._writes():
            self.writer.close()
        threading.excepthook = self.hook

    def _of_a_thread(self, found: Any) -> None:
        """What the writer's own thread fails to write is raised here by the next call: no traceback beside it."""
        of_writer = type(found.thread).__module__.startswith("tensorboard.")
        if not (of_writer and issubclass(found.exc_type, OSError)):
            self.hook(found)

    @contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.folder, error) from error


def check_installed() -> None:
    """
    Raises:
        BadInput: TensorBoard is not installed; says how to install it.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        needs = "run `pip install 'refinenet_fast[tensorboard]'`"
        raise BadInput(f"tensorboard: expected the package tensorboard, which is not installed: {needs}") from error
