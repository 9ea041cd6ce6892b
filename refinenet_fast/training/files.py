"""Reading images and masks, with one-line errors that name the file; writing files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from refinenet_fast import files
from refinenet_fast.files import PARTIAL

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
IMAGE_MODES = ("RGB", "L", "P", "1")
MASK_MODES = ("P", "L", "1", "I;16")
_SPREAD = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of 2 and 4 bits by, so that the largest is 255


class BadInput(Exception):
    """What the user gave cannot be used. The message is one line, and is shown without a traceback."""


class Unreadable(BadInput):
    """A file of the user's that cannot be read or decoded, or is of another kind; others may do."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system refuses within the block, for want of rights mostly, made one line.

    Args:
        path: What is looked into, should the system not say what it refuses.

    Raises:
        BadInput: Instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        denied = isinstance(error, PermissionError)
        reason = "no permission to" if denied else error.strerror or first_line(error)
        raise BadInput(f"{error.filename or path}: expected a file or folder that can be read, got {reason}") from error


def images_below(folder: Path) -> list[Path]:
    """Every image file in ``folder`` and its subfolders, sorted.

    Raises:
        BadInput: It is no folder, or cannot be read, or one of its subfolders cannot.
    """

    def refuse(error: OSError) -> None:
        raise error

    with readable(folder):
        try:
            files = [Path(where, name) for where, _, names in os.walk(folder, onerror=refuse) for name in names]
        except (FileNotFoundError, NotADirectoryError) as error:
            got = "there is none" if isinstance(error, FileNotFoundError) else "got a file"
            raise BadInput(f"{folder}: expected a folder, {got}") from error
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES)


def read_image(path: Path) -> Tensor:  # (3, H, W) uint8
    """An image in RGB, turned as its EXIF orientation says.

    Raises:
        BadInput: It cannot be read or is damaged, or it is not 8-bit RGB or grey (16 bits, CMYK, transparency).
    """
    with _opened(path, IMAGE_MODES, "an 8-bit RGB or grey image") as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def read_mask(path: Path) -> Tensor:  # (H, W) int64
    """The class of every pixel: a palette's index or a grey value.

    Raises:
        BadInput: It cannot be read or is damaged, or it is no palette or grey image.
    """
    with _opened(path, MASK_MODES, "a palette or grey image as a mask") as image:
        factor = _SPREAD.get(_as_stored(image)[0], 1)
        return torch.from_numpy(np.array(image).astype(np.int64) // factor)


@contextmanager
def _opened(path: Path, modes: tuple[str, ...], expected: str) -> Iterator[ImageFile.ImageFile]:
    """An open image, whatever Pillow says of it there and within the block made one line."""
    try:
        with Image.open(path) as image:
            if image.mode not in modes:
                raise Unreadable(f"{path}: expected {expected}, got mode {image.mode}")
            if modes is IMAGE_MODES and (more := _more_than_colour(image)):
                raise Unreadable(f"{path}: expected {expected}, got mode {image.mode} with {more}")
            yield image
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: there is no such file") from error
    except PermissionError as error:
        raise Unreadable(f"{path}: expected a file that can be read, got no permission to") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of them
        reason = first_line(error)
        raise Unreadable(f"{path}: expected an image, got a file that cannot be decoded ({reason})") from error


def _more_than_colour(image: ImageFile.ImageFile) -> str:
    """What of an image's content its mode does not say and 8 bits of a colour lose; "" where there is nothing."""
    if "transparency" in image.info:
        return "transparency"
    raw, *rest = _as_stored(image)
    from_65536 = image.format == "PPM" and any(isinstance(largest, int) and largest > 255 for largest in rest)
    return "16 bits" if from_65536 or (raw.startswith("RGB") and ";16" in raw) else ""


def _as_stored(image: ImageFile.ImageFile) -> tuple[Any, ...]:
    """Pillow's name of how pixels lie in the file, such as ``"RGB;16B"``, and what its decoder is told beside it."""
    found = image.tile[0][3] if image.tile else ""
    name, *rest = found if isinstance(found, tuple) and found else (found,)
    return str(name), *rest


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """:func:`refinenet_fast.files.whole`.

    Raises:
        BadInput: The disk is full, or it cannot be written; ``path`` is as it was.
    """
    try:
        with files.whole(path) as file:
            yield file
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> BadInput:
    """What is said of a file or folder that the system would not write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return BadInput(f"{path}: cannot be written: {'the disk is full' if full else error.strerror or first_line(error)}")


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """``write`` to a :func:`whole` file."""
    with whole(path) as file:
        write(file)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write files in, that takes the place of ``path`` when the block is done; where it raises, none does.

    Raises:
        BadInput: It cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """:func:`write_whole` of ``content`` as JSON."""
    write_whole(path, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BadInput: It is not there, or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected a JSON file, got {error}") from error
