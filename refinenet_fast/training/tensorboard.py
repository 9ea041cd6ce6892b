"""A run's log for TensorBoard, beside its CSV (the extra ``tensorboard``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refinenet_fast.training.files import BadInput

FLUSH_SECONDS = 10


class Events:
    """Scalars and pictures of one run.

    Args:
        folder: Of its event files.
        step: The last step that was done: what an interrupted run has written after it is no longer shown.

    Raises:
        BadInput: TensorBoard is not installed, or ``folder`` cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=FLUSH_SECONDS)
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written: {error.strerror or error}") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(
        self,
        step: int,
        pixels: np.ndarray,  # (H, W, 3) uint8
    ) -> None:
        self.writer.add_image("input, truth, prediction", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


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
