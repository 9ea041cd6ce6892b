"""Reading and writing videos, frame by frame, by PyAV (the extra ``video``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from refinenet_fast.training.files import BadInput, Unreadable, first_line, whole

SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
CODECS = ("libx264", "mpeg4")  # the first that this PyAV has


class Frame(NamedTuple):
    """One frame and when it is shown."""

    pixels: np.ndarray  # (H, W, 3) uint8
    time: int  # in units of `unit`
    unit: Fraction  # seconds


def frames(path: Path) -> Iterator[Frame]:
    """The frames of a file's first video stream, in RGB, turned as the file says.

    Raises:
        Unreadable: It cannot be read, is damaged, or holds no video.
        BadInput: PyAV is not installed.
    """
    av = _import_av()
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unreadable(f"{path}: expected a video, got a file without a video stream")
            for count, frame in enumerate(container.decode(video=0), 1):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                time = count - 1 if frame.pts is None else frame.pts
                yield Frame(np.ascontiguousarray(pixels), time, frame.time_base)
    except (av.FFmpegError, ValueError) as error:
        reason = first_line(error)
        raise Unreadable(f"{path}: expected a video, got a file that cannot be decoded ({reason})") from error
    if not count:
        raise Unreadable(f"{path}: expected a video, got a file without frames")


class Writer:
    """An MP4 of frames that keep their times; of even sides, as its codecs want: an odd side's last line is repeated.

    Args:
        file: What it is written to, open.
        first: The first frame, for size and unit of time.
    """

    def __init__(self, file: BinaryIO, first: Frame) -> None:
        av = _import_av()
        self.container: Any = av.open(file, mode="w", format="mp4")
        codec = next(name for name in CODECS if name in av.codecs_available)
        self.stream = self.container.add_stream(codec)
        height, width = first.pixels.shape[:2]
        self.stream.height, self.stream.width, self.stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        self.stream.codec_context.time_base = first.unit

    def write(self, frame: Frame) -> None:
        import av

        height, width = frame.pixels.shape[:2]
        even = np.pad(frame.pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
        picture = av.VideoFrame.from_ndarray(even, format="rgb24")
        picture.pts, picture.time_base = frame.time, frame.unit
        self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


@contextmanager
def writing(path: Path, first: Frame, source: Path) -> Iterator[Writer]:
    """A :class:`Writer` of a file that is whole, or not there.

    Args:
        source: Where the frames are from.

    Raises:
        Unreadable: The encoder does not take the frames: sides beyond its largest, times that go back.
        BadInput: It cannot be written.
    """
    av = _import_av()
    with whole(path) as file:
        try:
            writer = Writer(file, first)
            yield writer
            writer.close()
        except av.FFmpegError as error:
            raise Unreadable(f"{source}: expected frames that an MP4 can hold, got {first_line(error)}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise BadInput("videos need PyAV: run `pip install 'refinenet_fast[video]'`") from error
    return av
