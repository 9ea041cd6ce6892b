"""Writing files that are whole or not there."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # ends the name of a file that is being written


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, such that ``path`` is the old one or the whole new one, whatever happens, a power cut included.

    It is written beside, synced, renamed, and the folder, which is made where there is none, is synced; where the block
    raises, ``path`` stays as it was.

    Raises:
        OSError: It cannot be written; ``path`` is as it was.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
