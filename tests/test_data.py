"""Data sets: how files are paired and read, what is refused, what augmentation and the order depend on."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from refinenet_fast.training import survey
from refinenet_fast.training.augment import Augment
from refinenet_fast.training.data import Order, TrainingSet, collate, open_split
from refinenet_fast.training.files import BadInput, read_image, read_mask, write_whole
from refinenet_fast.training.loop import without_bars
from refinenet_fast.training.samples import CLASSES, write_samples
from training_runs import SIZE, samples, without_rights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "samples")


# -- reading ------------------------------------------------------------------------------------------------------


def test_samples_are_read_as_written(data):
    split = open_split(data, "folder", "train")
    assert len(split) == 5 and split.class_names == list(CLASSES)
    image, mask = split.read(0)
    assert image.shape == (3, *SIZE) and image.dtype == torch.uint8 and mask.shape == SIZE
    assert set(mask.unique().tolist()) <= {*range(len(CLASSES)), 255}


def test_the_same_seed_gives_the_same_samples(tmp_path):
    for name in ("a", "b"):
        write_samples(tmp_path / name, 2, 1, SIZE, seed=3)
    for file in (tmp_path / "a").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_in_exif_is_applied(tmp_path, orientation):
    upright = np.zeros((4, 6, 3), dtype=np.uint8)
    upright[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(upright)
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turn |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    if orientation > 1:  # the inverse of what a viewer does
        stored = stored.transpose(Image.Transpose[turn[orientation]])
    stored.save(tmp_path / "x.png", exif=exif)
    image = read_image(tmp_path / "x.png")
    assert image.shape == (3, 4, 6)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_a_mask_is_a_palettes_index_or_a_grey_value(tmp_path, mode):
    values = np.arange(12, dtype=np.uint16 if mode == "I;16" else np.uint8).reshape(3, 4)
    mask = Image.fromarray(values)
    if mode == "P":
        mask.putpalette(bytes(reversed(range(256))) * 3)
    mask.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
    assert np.array_equal(read_mask(tmp_path / "mask.png").numpy(), values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "I;16", "F"])
def test_images_of_another_kind_are_refused_by_name(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode in ("CMYK", "F") else "image.png")
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(BadInput, match=rf"image.*: expected an 8-bit RGB or grey image, got mode {mode}"):
        read_image(path)


def png(path: Path, depth: int, colour: int, row: bytes, **more: bytes) -> Path:
    """A PNG of one row, of a kind that Pillow does not write.

    Args:
        depth, colour: IHDR's bit depth and colour type (0 grey, 2 RGB, 3 palette).
        more: Further chunks by name.
    """

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width = 8 * len(row) // (depth * (3 if colour == 2 else 1))
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))]
    chunks += [chunk(name.encode(), content) for name, content in more.items()]
    chunks += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


@pytest.mark.parametrize(
    "depth, colour, more, message",
    [
        (16, 2, {}, "mode RGB with 16 bits"),
        (8, 2, {"tRNS": bytes(6)}, "mode RGB with transparency"),
        (8, 0, {"tRNS": bytes(2)}, "mode L with transparency"),
        (8, 3, {"PLTE": bytes(6), "tRNS": bytes(1)}, "mode P with transparency"),
        (1, 0, {"tRNS": bytes(2)}, "mode 1 with transparency"),
    ],
    ids=["RGB-16", "RGB", "L", "P", "1"],
)
def test_depth_and_transparency_that_the_mode_does_not_tell_are_refused(tmp_path, depth, colour, more, message):
    with pytest.raises(BadInput, match=rf"x\.png: expected an 8-bit RGB or grey image, got {message}"):
        read_image(png(tmp_path / "x.png", depth, colour, bytes(12), **more))
    if depth != 16:
        opaque = {name: content for name, content in more.items() if name != "tRNS"}
        assert not read_image(png(tmp_path / "x.png", depth, colour, bytes(12), **opaque)).any()


def test_16_bits_of_a_ppm_are_refused(tmp_path):
    (tmp_path / "x.ppm").write_bytes(b"P6 2 1 65535\n" + bytes(12))
    with pytest.raises(BadInput, match=r"x\.ppm: .*, got mode RGB with 16 bits"):
        read_image(tmp_path / "x.ppm")
    (tmp_path / "x.ppm").write_bytes(b"P6 2 1 255\n" + bytes(6))
    assert read_image(tmp_path / "x.ppm").shape == (3, 1, 2)


@pytest.mark.parametrize(
    "depth, row, expected",
    [
        (1, b"\xa0", [1, 0, 1, 0, 0, 0, 0, 0]),
        (2, b"\x1b\x00", [0, 1, 2, 3, 0, 0, 0, 0]),
        (4, b"\x01\x2f", [0, 1, 2, 15]),
    ],
)
def test_a_mask_of_few_bits_holds_classes(tmp_path, depth, row, expected):
    """Grey, as tools that shrink PNGs leave it, and a palette's indices."""
    assert read_mask(png(tmp_path / "grey.png", depth, 0, row)).tolist() == [expected]
    assert read_mask(png(tmp_path / "palette.png", depth, 3, row, PLTE=bytes(48))).tolist() == [expected]


def test_transparency_of_a_mask_says_nothing(tmp_path):
    assert read_mask(png(tmp_path / "x.png", 8, 3, b"\0\1", PLTE=bytes(6), tRNS=bytes(1))).tolist() == [[0, 1]]


@pytest.mark.parametrize("name", ["x.jpg", "x.webp", "x.bmp", "x.tif", "x.png", "x.ppm", "x.gif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_8_bits_are_read(tmp_path, name, mode):
    Image.new(mode, (4, 3), 100 if mode == "L" else (100, 100, 100)).save(tmp_path / name)
    assert (read_image(tmp_path / name).float() - 100).abs().max() <= 2


def damaged(path: Path) -> None:
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files_are_one_line_that_names_them(tmp_path):
    damaged(tmp_path / "half.jpg")
    (tmp_path / "text.png").write_text("not an image\n")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("half.jpg", "text.png", "empty.png", "absent.png"):
        with pytest.raises(BadInput, match=name) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="expected a palette or grey image as a mask, got mode RGB"):
        Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
        read_mask(tmp_path / "colour.png")


# -- pairs --------------------------------------------------------------------------------------------------------


def test_an_image_without_mask_and_a_mask_without_image(data):
    mask = data / "masks" / "train" / "001.png"
    kept = mask.read_bytes()
    mask.unlink()
    with pytest.raises(BadInput, match=r"images/train/001\.png: expected a mask .*masks/train/001\.png"):
        open_split(data, "folder", "train")
    mask.write_bytes(kept)
    (data / "images" / "train" / "001.png").unlink()
    with pytest.raises(BadInput, match=r"masks/train/001\.png: expected an image .*images/train/001"):
        open_split(data, "folder", "train")


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp"])
def test_a_mask_that_is_no_png(data, suffix):
    """A JPEG's values are near those that were saved, which for classes is no good."""
    mask = data / "masks" / "train" / "001.png"
    Image.open(mask).convert("L").save(mask.with_suffix(suffix))
    mask.unlink()
    with pytest.raises(BadInput, match=rf"masks/train/001\{suffix}: expected a PNG as a mask, got {suffix}"):
        open_split(data, "folder", "train")


def test_two_images_of_one_name(data):
    shutil.copy(data / "images" / "train" / "001.png", data / "images" / "train" / "001.bmp")
    with pytest.raises(BadInput, match=r"001\.png: expected one file of this name, got 001\.bmp as well"):
        open_split(data, "folder", "train")


def test_what_is_no_data_set(data, tmp_path):
    for folder in (data / "images" / "val", data / "masks" / "val"):
        shutil.rmtree(folder)
    with pytest.raises(BadInput, match=r"images/val: expected a folder, there is none"):
        open_split(data, "folder", "val")
    for folder in (data / "images" / "val", data / "masks" / "val"):
        folder.mkdir()
    with pytest.raises(BadInput, match="expected images in the split 'val', got an empty one"):
        open_split(data, "folder", "val")
    with pytest.raises(BadInput, match="layout: expected one of folder, voc, sbd, cityscapes, got 'coco'"):
        open_split(data, "coco", "val")
    for layout in ("voc", "cityscapes"):
        with pytest.raises(BadInput, match="expected torchvision's layout") as error:
            open_split(tmp_path, layout, "val")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("locked", ["images", "images/train", "images/train/deep", "masks/train"])
def test_a_folder_without_rights(data, ordinary_rights, locked):
    """Itself, a folder above it, one of its subfolders, which would otherwise be passed over."""
    for kind in ("images", "masks"):
        (data / kind / "train" / "deep").mkdir()
        (data / kind / "train" / "001.png").rename(data / kind / "train" / "deep" / "001.png")
    assert len(open_split(data, "folder", "train")) == 5
    message = rf"{locked}.*: expected a file or folder that can be read, got no permission"
    with without_rights(data / locked), pytest.raises(BadInput, match=message):
        open_split(data, "folder", "train")


def test_sizes_and_values_are_checked(data):
    split = replace(open_split(data, "folder", "train"), num_classes=len(CLASSES))
    mask = np.array(Image.open(split.masks[1]))
    mask[0, :3] = 77
    Image.fromarray(mask).save(split.masks[1])
    with pytest.raises(BadInput, match=r"001\.png: expected classes 0 to 4, or 255 .*, got 77 \(in 3 pixels\)"):
        survey.scan(split, without_bars)
    Image.fromarray(mask[1:]).save(split.masks[1])
    with pytest.raises(BadInput, match=r"masks/train/001\.png: expected a mask of 64x48 pixels, as .*, got 64x47"):
        survey.scan(split, without_bars)


# -- torchvision's ------------------------------------------------------------------------------------------------


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000032\n")
    Image.new("RGB", (6, 4)).save(root / "JPEGImages" / "2007_000032.jpg")
    mask = Image.fromarray(np.full((4, 6), 20, dtype=np.uint8))
    mask.putpalette(bytes(range(256)) * 3)
    mask.save(root / "SegmentationClass" / "2007_000032.png")
    split = open_split(tmp_path, "voc", "train")
    assert len(split.class_names) == 21 and split.class_names[0] == "background" and split.class_names[15] == "person"
    assert (split.read(0)[1] == 20).all()


def test_cityscapes(tmp_path):
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder / "train" / "bonn").mkdir(parents=True)
    Image.new("RGB", (3, 1)).save(tmp_path / "leftImg8bit" / "train" / "bonn" / "bonn_000000_000019_leftImg8bit.png")
    labels = np.array([[7, 26, 3]], dtype=np.uint8)  # road, car, out of the region of interest
    mask = tmp_path / "gtFine" / "train" / "bonn" / "bonn_000000_000019_gtFine_labelIds.png"
    Image.fromarray(labels).save(mask)
    split = open_split(tmp_path, "cityscapes", "train")
    assert len(split.class_names) == 19 and split.class_names[13] == "car"
    assert split.read(0)[1].tolist() == [[0, 13, 255]]
    Image.fromarray(np.array([[7, 26, 300]], dtype=np.uint16)).save(mask)
    with pytest.raises(BadInput, match=r"bonn_000000_000019_gtFine_labelIds\.png: .* label ids, below 256, got 300"):
        split.read(0)


def test_sbd(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    for folder in ("img", "cls", "inst"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.txt").write_text("2008_000002\n")
    Image.new("RGB", (6, 4)).save(tmp_path / "img" / "2008_000002.jpg")
    labels = {"GTcls": {"Segmentation": np.full((4, 6), 20, dtype=np.uint8)}}
    scipy_io.savemat(tmp_path / "cls" / "2008_000002.mat", labels)
    split = open_split(tmp_path, "sbd", "train")
    assert (split.read(0)[1] == 20).all()


# -- what a scan finds --------------------------------------------------------------------------------------------


def test_a_scan_counts(data):
    split = open_split(data, "folder", "train")
    found = survey.scan(split, without_bars)
    masks = torch.stack([split.read(k)[1] for k in range(len(split))])
    assert torch.equal(found.pixels, masks.flatten().bincount()) and found.sizes == Counter({SIZE: 5})
    labelled = masks[masks != 255]
    assert survey.infer_classes([found], 255) == int(labelled.max()) + 1
    with pytest.raises(BadInput, match="num_classes: expected 5, as many as the data set names, got 7"):
        survey.decide_classes(split, 7)


def test_class_weights_are_the_inverse_of_shares():
    weights = survey.class_weights(torch.tensor([10, 30, 0, 60]), 5, "balanced")
    assert weights[2] == weights[4] == 0 and weights[0] == pytest.approx(3 * weights[1])
    assert sum(weights) == pytest.approx(3)  # the classes there are


def test_class_weights_by_the_logarithm_are_enets():
    """1 / ln(1.02 + share), worked out by hand; classes that are not labelled anywhere count for nothing."""
    weights = survey.class_weights(torch.tensor([1, 39, 0, 60]), 5, "log")
    assert weights == pytest.approx([33.8309, 2.9104, 0, 2.0729, 0], abs=1e-4)


# -- augmentation and order ---------------------------------------------------------------------------------------


def augment(**options) -> Augment:
    settings = {"crop": (32, 40), "scales": (0.7, 1.3), "flip": 0.5, "colour": 0.2, "ignore_value": 255}
    return Augment(**{**settings, **options}, mean=MEAN, std=STD)


def test_augmentation_moves_image_and_mask_together(data):
    """An image whose channels are its mask: they stay the same to within interpolation, padding aside."""
    mask = open_split(data, "folder", "train").read(0)[1]
    image = mask.expand(3, -1, -1).to(torch.uint8)
    fixed = augment(scales=(1.0, 1.0), colour=0.0, crop=(64, 48))  # padded below, cropped at the side
    for seed in range(8):
        torch.manual_seed(seed)
        pixels, labels = fixed(image, mask)
        assert pixels.shape == (3, 64, 48) and pixels.dtype == torch.float32 and labels.shape == (64, 48)
        values = ((pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255).round()
        inside = values[0] != round(255 * MEAN[0])
        assert torch.equal(values[0][inside].long(), labels[inside]) and (labels[~inside] == 255).all()


def test_scaling_keeps_the_values_of_masks(data):
    split = open_split(data, "folder", "train")
    image, mask = split.read(0)
    for seed in range(8):
        torch.manual_seed(seed)
        labels = augment()(image, mask)[1]
        assert set(labels.unique().tolist()) <= {*mask.unique().tolist(), 255}


def test_what_is_seen_depends_on_the_key_alone(data):
    split = open_split(data, "folder", "train")
    chosen = TrainingSet(split, augment(), seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = chosen[3, 2, True]
    assert torch.equal(torch.get_rng_state(), before)  # the network's dropout is left alone
    torch.manual_seed(6)
    for a, b in zip(first, chosen[3, 2, True]):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], chosen[4, 2, True][0])
    assert (chosen[3, 2, False][1] == 255).all()


def test_a_bad_file_comes_as_a_value_through_workers(data):
    split = open_split(data, "folder", "train")
    damaged(split.images[2])
    loader = torch.utils.data.DataLoader(
        TrainingSet(split, augment(), seed=1),
        batch_sampler=[[(0, 1, True), (0, 2, True)]],
        collate_fn=collate,
        num_workers=1,
    )
    (batch,) = loader
    assert isinstance(batch, BadInput) and "002.png" in str(batch)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_each_epoch_shows_every_image_once_over_all_ranks(world):
    images, batch, steps = 7, 3, 6
    orders = [list(Order(images, batch, 5, 0, steps, rank, world)) for rank in range(world)]
    whole = list(Order(images, batch, 5, 0, steps))
    for step in range(steps):
        together = [key for order in orders for key in order[step]]
        assert sorted(key for key in together if key[2]) == sorted(whole[step])
        assert all(order[step] for order in orders)  # every rank takes every step
    for epoch in range(2):
        seen = [index for keys in whole for e, index, _ in keys if e == epoch]
        assert sorted(seen) == list(range(images))
    assert whole[:3] != whole[3:]
    assert list(Order(images, batch, 5, 4, steps)) == whole[4:]  # from the middle of an epoch


# -- writing ------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    import errno

    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def fails(number: int, *_: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(BadInput, match=r"x\.bin: cannot be written: the disk is full"):
        write_whole(path, lambda file: fails(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda descriptor: fails(errno.EIO))
    with pytest.raises(BadInput, match="Input/output error"):
        write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
