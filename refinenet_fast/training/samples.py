"""A generated data set: coloured shapes on textured ground, to try everything out on without a download."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from refinenet_fast.training.files import BadInput, readable, write_whole
from refinenet_fast.training.pictures import palette, save_image, save_mask

CLASSES = ("ground", "disc", "square", "triangle", "bar")
COLOURS = ((120, 120, 110), (190, 80, 70), (70, 150, 80), (70, 90, 190), (200, 180, 70))
IGNORED = 255


def write_samples(
    folder: Path, train: int = 32, val: int = 8, size: tuple[int, int] = (96, 128), seed: int = 0
) -> None:
    """Write images, masks and ``classes.txt``; the same seed gives the same pixels.

    Each class has a colour, from which each shape strays; their outlines are unlabelled.

    Raises:
        BadInput: ``folder`` is not empty, or cannot be written.
    """
    with readable(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise BadInput(f"{folder}: expected a folder that is empty or new, got one that holds something")
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            generator = np.random.default_rng([seed, split == "val", number])
            image, mask = scene(generator, size)
            save_image(folder / "images" / split / f"{number:03d}.png", image)
            save_mask(folder / "masks" / split / f"{number:03d}.png", mask, palette(len(CLASSES)))
    names = "\n".join(CLASSES) + "\n"
    write_whole(folder / "classes.txt", lambda file: file.write(names.encode()))


def scene(
    generator: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:  # (H, W, 3) uint8, (H, W) uint8
    """An image and its mask."""
    height, width = size
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    colours = np.empty((height, width, 3))
    colours[:] = _colour(generator, 0)
    for label in generator.integers(1, len(CLASSES), size=generator.integers(3, 8)):
        before = np.array(mask)
        radius = generator.uniform(0.15, 0.35) * min(size)
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        _draw(draw, int(label), x, y, radius, generator.uniform(0, 2 * math.pi))
        colours[np.array(mask) != before] = _colour(generator, label)
    labels = np.array(mask)
    edges = np.zeros_like(labels, dtype=bool)
    edges[1:] |= labels[1:] != labels[:-1]
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    image = colours + generator.normal(0, 12, colours.shape)
    return image.clip(0, 255).astype(np.uint8), np.where(edges, IGNORED, labels).astype(np.uint8)


def _colour(generator: np.random.Generator, label: int) -> np.ndarray:  # (3,)
    return np.array(COLOURS[label]) + generator.normal(0, 25, 3)


def _draw(draw: ImageDraw.ImageDraw, label: int, x: float, y: float, radius: float, angle: float) -> None:
    name = CLASSES[label]
    if name == "disc":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label)
        return
    if name == "bar":
        corners = [
            (2 * radius, radius / 4),
            (-2 * radius, radius / 4),
            (-2 * radius, -radius / 4),
            (2 * radius, -radius / 4),
        ]
    else:
        sides = {"square": 4, "triangle": 3}[name]
        turns = [2 * math.pi * k / sides for k in range(sides)]
        corners = [(radius * math.cos(t), radius * math.sin(t)) for t in turns]
    cos, sin = math.cos(angle), math.sin(angle)
    draw.polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in corners], fill=label)
