"""Prediction: tiles, names, what is written, and what happens to bad files."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from PIL import Image

from refinenet_fast.model import Prediction
from refinenet_fast.training import video
from refinenet_fast.training.files import BadInput, Unreadable, read_mask
from refinenet_fast.training.model_file import Description
from refinenet_fast.training.pictures import palette
from refinenet_fast.training.prediction import Segmenter, find_inputs, predict_files, spans
from training_runs import processes


class Brightness(nn.Module):
    """Class 0 or 1 by a pixel's mean over a window of 5x5: a network whose field of view is known."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 2, 5, padding=2)
        self.largest = 0
        nn.init.ones_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.classifier.weight.data[0] = 0

    def forward(
        self,
        images: torch.Tensor,  # (N, 3, H, W)
    ) -> torch.Tensor:  # (N, 2, H, W)
        self.largest = max(self.largest, *images.shape[2:])
        return self.classifier(images)

    def predict(
        self,
        images: torch.Tensor,  # (N, 3, H, W)
    ) -> Prediction:
        probabilities, classes = self(images).softmax(1).max(1)
        return Prediction(classes, probabilities)


@pytest.fixture
def segment() -> Segmenter:
    return Segmenter(Brightness().eval(), Description({}, ["dark", "bright"], [0.5] * 3, [0.5] * 3))


def photo(path: Path, size: tuple[int, int] = (20, 30), seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


# -- tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40, 61])
@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 3), (8, 7), (1, 0), (100, 20)])
def test_tiles_keep_every_pixel_once(length, tile, overlap):
    kept = []
    found = spans(length, tile, overlap)
    for span in found:
        assert 0 <= span.begin <= span.keep_begin <= span.keep_end <= span.end <= length
        assert span.end - span.begin == min(tile, length)
        assert span.begin == 0 or span.keep_begin - span.begin >= overlap // 2
        assert span.end == length or span.end - span.keep_end >= overlap // 2
        kept += range(span.keep_begin, span.keep_end)
    assert kept == list(range(length))


@pytest.mark.parametrize("size", [(33, 50), (16, 70), (64, 64), (5, 3)])
def test_tiles_give_what_the_whole_image_gives(segment, size):
    """Where their overlap covers the field of view."""
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    whole = replace(segment, tile=0)(image)
    assert 0 < whole.float().mean() < 1 or size == (5, 3)
    segment.network.largest = 0
    assert torch.equal(replace(segment, tile=16, overlap=4)(image), whole)
    assert segment.network.largest <= 16


# -- files --------------------------------------------------------------------------------------------------------


def test_inputs_are_files_folders_and_patterns(tmp_path):
    files = [photo(tmp_path / "in" / name) for name in ("a.png", "deep/b.png", "c.bmp")]
    (tmp_path / "in" / "notes.txt").write_text("no image")
    found = find_inputs([str(tmp_path / "in")])
    assert found == {files[0]: Path("a"), files[1]: Path("deep/b"), files[2]: Path("c")}
    assert find_inputs([str(tmp_path / "in" / "*.png")]) == {files[0]: Path("a")}
    assert find_inputs([str(files[2]), str(files[2])]) == {files[2]: Path("c")}
    for missing in ("nothing.jpg", "*.jpg"):
        with pytest.raises(BadInput, match="expected a file, a folder or a pattern, and nothing matches it"):
            find_inputs([str(tmp_path / "in" / missing)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="expected images, got a folder without any"):
        find_inputs([str(tmp_path / "empty")])
    other = photo(tmp_path / "a.png")
    with pytest.raises(BadInput, match=r"a\.png: expected a name of its own, got the same as .*in/a\.png"):
        find_inputs([str(files[0]), str(other)])


def test_what_is_written(segment, tmp_path):
    path = photo(tmp_path / "in" / "a.png")
    found = find_inputs([str(path)])
    assert list(predict_files(segment, found, tmp_path / "out")) == [(path, None)]
    classes = read_mask(tmp_path / "out" / "classes" / "a.png")
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(classes, segment(image).long())
    with Image.open(tmp_path / "out" / "colour" / "a.png") as colour:
        shown = np.array(colour.convert("RGB"))
    assert np.array_equal(shown, palette(2)[classes.numpy()])
    with Image.open(tmp_path / "out" / "overlay" / "a.png") as overlay:
        assert overlay.mode == "RGB" and overlay.size == (30, 20)
    with pytest.raises(BadInput, match=r"classes/a\.png: there already; --overwrite replaces it"):
        list(predict_files(segment, found, tmp_path / "out"))
    assert list(predict_files(segment, found, tmp_path / "out", overwrite=True)) == [(path, None)]
    with pytest.raises(BadInput, match="outputs: expected some of classes, colour, overlay, got heat"):
        list(predict_files(segment, found, tmp_path / "other", ["heat"]))


def test_a_bad_file_is_skipped_and_the_rest_goes_on(segment, tmp_path):
    files = [photo(tmp_path / "in" / name) for name in ("a.png", "b.png", "c.png")]
    files[1].write_bytes(files[1].read_bytes()[:300])
    results = list(predict_files(segment, find_inputs([str(tmp_path / "in")]), tmp_path / "out"))
    assert [file for file, _ in results] == files
    assert [problem is None for _, problem in results] == [True, False, True]
    assert "b.png: expected an image, got a file that cannot be decoded" in str(results[1][1])
    assert sorted(f.name for f in (tmp_path / "out" / "classes").iterdir()) == ["a.png", "c.png"]


def test_a_photo_is_turned_as_its_exif_says(segment, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "turned.jpg", exif=exif)
    list(predict_files(segment, find_inputs([str(tmp_path / "turned.jpg")]), tmp_path / "out"))
    assert read_mask(tmp_path / "out" / "classes" / "turned.png").shape == (30, 20)


def test_colours_are_those_of_voc():
    colours = palette(256)
    assert colours[[0, 1, 2, 15]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128]]
    assert len({tuple(c) for c in colours.tolist()}) == 256 and (palette(5)[5:] == 255).all()


# -- videos -------------------------------------------------------------------------------------------------------


def film(path: Path, size: tuple[int, int] = (22, 31), count: int = 5) -> Path:
    """A dark video that becomes bright, a frame every 1/10 s but the last, which comes late."""
    pytest.importorskip("av")
    frames = [
        video.Frame(np.full((*size, 3), 255 * k // (count - 1), np.uint8), k + (k == count - 1), Fraction(1, 10))
        for k in range(count)
    ]
    with video.writing(path, frames[0], path) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def test_a_video(segment, tmp_path):
    path = film(tmp_path / "in" / "a.mp4")
    found = find_inputs([str(path)])
    assert list(predict_files(segment, found, tmp_path / "out")) == [(path, None)]
    masks = sorted((tmp_path / "out" / "classes" / "a").iterdir())
    assert [mask.name for mask in masks] == [f"{k:06d}.png" for k in range(5)]
    given = list(video.frames(path))
    for mask, frame in zip(masks, given, strict=True):
        assert torch.equal(read_mask(mask), segment(torch.from_numpy(frame.pixels).permute(2, 0, 1)).long())
    assert not read_mask(masks[0]).any() and read_mask(masks[-1]).all()
    for output in ("colour", "overlay"):
        shown = list(video.frames(tmp_path / "out" / output / "a.mp4"))
        assert [frame.time * frame.unit for frame in shown] == [frame.time * frame.unit for frame in given]
        assert {frame.pixels.shape for frame in shown} == {(22, 32, 3)}
    assert shown[-1].pixels.mean() > shown[0].pixels.mean() + 50
    with pytest.raises(BadInput, match=r"classes/a: there already; --overwrite replaces it"):
        list(predict_files(segment, found, tmp_path / "out"))
    assert list(predict_files(segment, found, tmp_path / "out", ["classes"], overwrite=True)) == [(path, None)]


def test_no_result_lies_in_a_videos_folder(segment, tmp_path):
    """classes/a/x.png of in/a/x.png, and the folder classes/a of the frames of a.mp4, which would take its place."""
    path, image = film(tmp_path / "a.mp4"), photo(tmp_path / "in" / "a" / "deep" / "x.png")
    for inputs in ((image.parents[2], path), (path, image.parents[2])):
        with pytest.raises(BadInput, match=r"x\.png: expected a name outside the folder of .*a\.mp4's frames"):
            find_inputs([str(given) for given in inputs])
    other = photo(tmp_path / "a.d" / "a.png")
    assert find_inputs([str(image.parents[2]), str(other)]) == {image: Path("a/deep/x"), other: Path("a")}


def test_a_video_that_breaks_off_leaves_nothing(segment, tmp_path, monkeypatch):
    path, image = film(tmp_path / "in" / "a.mp4"), photo(tmp_path / "in" / "b.png")
    whole = video.frames

    def broken(file: Path) -> Iterator[video.Frame]:
        yield from islice(whole(file), 2)
        raise Unreadable(f"{file}: broken")

    monkeypatch.setattr(video, "frames", broken)
    results = dict(predict_files(segment, find_inputs([str(path), str(image)]), tmp_path / "out"))
    assert str(results[path]) == f"{path}: broken" and results[image] is None
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"b.png"}


def test_a_video_that_no_mp4_can_hold_is_skipped(segment, tmp_path):
    """Of 20,000 pixels a row, which H.264 and MPEG-4 do not know."""
    av = pytest.importorskip("av")
    path, image = tmp_path / "in" / "wide.mkv", photo(tmp_path / "in" / "b.png")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 20000, 2, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((2, 20000, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    results = dict(predict_files(segment, find_inputs([str(path), str(image)]), tmp_path / "out"))
    assert (
        str(results[path]).startswith(f"{path}: expected frames that an MP4 can hold, got ") and results[image] is None
    )
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"b.png"}
    assert dict(predict_files(segment, find_inputs([str(path)]), tmp_path / "classes", ["classes"])) == {path: None}


@pytest.mark.parametrize("content", [b"", b"no video at all", b"cut"])
def test_a_file_that_is_no_video_is_skipped(segment, tmp_path, content):
    path = film(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:200] if content == b"cut" else content)
    ((_, problem),) = predict_files(segment, find_inputs([str(path)]), tmp_path / "out")
    assert "a.mp4: expected a video, got a file" in str(problem) and "\n" not in str(problem)
    assert not (tmp_path / "out").exists() or not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_without_the_extra_videos_say_what_to_install(segment, tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"videos need PyAV: run `pip install 'refinenet_fast\[video\]'`"):
        list(predict_files(segment, find_inputs([str(path)]), tmp_path / "out"))


# -- memory -------------------------------------------------------------------------------------------------------


def predict_large(side: int, folder: Path) -> None:
    """All outputs of a square image, by a narrow network in tiles; the process's peak memory goes into a file."""
    from refinenet_fast import RefineNet

    torch.set_num_threads(1)
    model = RefineNet(3, "test_resnet", width=8, deep_width=8).eval()
    segment = Segmenter(model, Description({}, list("abc"), [0.5] * 3, [0.5] * 3), tile=256, overlap=64)
    image = folder / f"{side}.png"
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(image)
    list(predict_files(segment, {image: Path(str(side))}, folder / "out"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"{side}.txt").write_text(str(peak))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_peak_memory_grows_by_few_bytes_a_pixel(tmp_path):
    """Of a whole prediction, files and pictures included; 10,000 x 10,000 pixels then need under 6 GB."""
    pytest.importorskip("timm")
    sides, peaks = (600, 2600), []
    for side in sides:
        process = processes().Process(target=predict_large, args=(side, tmp_path))
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks.append(int((tmp_path / f"{side}.txt").read_text()))
    pixels = sides[1] ** 2 - sides[0] ** 2
    assert (peaks[1] - peaks[0]) / pixels < 30
