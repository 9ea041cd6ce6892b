"""Images and masks of a data set: a plain folder's, or those of torchvision's VOC, SBD and Cityscapes classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from refinenet_fast.training.files import BadInput, first_line, images_below, read_image, read_mask

Key = tuple[int, int, bool]  # epoch, index, whether its labels count


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    Attributes:
        name: ``"train"``, ``"val"``, ...
        images: Files.
        masks: The file of each image's mask.
        class_names: Where the data set says them; else None.
        read_mask: File -> (H, W) int64.
        num_classes, ignore_value: What a mask may hold; unchecked while None.
    """

    name: str
    images: list[Path]
    masks: list[Path]
    class_names: list[str] | None = None
    read_mask: Callable[[Path], Tensor] = read_mask
    num_classes: int | None = None
    ignore_value: int = 255

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, Tensor]:  # (3, H, W) uint8, (H, W) int64
        """An image and its mask.

        Raises:
            BadInput: One cannot be read, their sizes differ, or the mask has a value that is no class.
        """
        image, mask = read_image(self.images[index]), self.read_mask(self.masks[index])
        if mask.shape != image.shape[1:]:
            got, expected = (f"{width}x{height}" for height, width in (mask.shape, image.shape[1:]))
            raise BadInput(
                f"{self.masks[index]}: expected a mask of {expected} pixels, as {self.images[index]} has, got {got}"
            )
        if self.num_classes is not None:
            self._check_values(self.masks[index], mask)
        return image, mask

    def _check_values(
        self,
        path: Path,
        mask: Tensor,  # (H, W) int64
    ) -> None:
        wrong = mask[(mask >= self.num_classes) & (mask != self.ignore_value)]
        if len(wrong):
            raise BadInput(
                f"{path}: expected classes 0 to {self.num_classes - 1}, or {self.ignore_value} where unlabelled, got "
                f"{int(wrong[0])} (in {len(wrong)} pixels)"
            )


def open_split(root: Path, layout: str, split: str) -> Split:
    """A split of the data set in ``root``, its files listed and paired.

    Args:
        layout: ``"folder"`` (``images/<split>/*`` and ``masks/<split>/*.png`` of the same names, class names in
            ``classes.txt`` if it is there), or ``"voc"``, ``"sbd"``, ``"cityscapes"`` as torchvision expects them.

    Raises:
        BadInput: An image lacks its mask or a mask its image, or is no PNG; the split is empty; ``root`` is no such
            data set.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    found = LAYOUTS[layout](root, split)
    if not found.images:
        raise BadInput(f"{root}: expected images in the split {split!r}, got an empty one")
    return found


def _folder(root: Path, split: str) -> Split:
    images_folder, masks_folder = root / "images" / split, root / "masks" / split
    images, masks = images_below(images_folder), images_below(masks_folder)
    for mask in masks:
        if mask.suffix.lower() != ".png":
            raise BadInput(f"{mask}: expected a PNG as a mask, got {mask.suffix}")
    by_name = _by_name(images, images_folder)
    masks_by_name = _by_name(masks, masks_folder)
    for name, image in by_name.items():
        if name not in masks_by_name:
            raise BadInput(f"{image}: expected a mask {masks_folder / name}.png, there is none")
    for name, mask in masks_by_name.items():
        if name not in by_name:
            raise BadInput(f"{mask}: expected an image {images_folder / name}.*, there is none")
    return Split(split, images, [masks_by_name[name] for name in by_name], _names_in(root / "classes.txt"))


def _by_name(files: list[Path], folder: Path) -> dict[Path, Path]:
    """Files by their names without suffix."""
    named: dict[Path, Path] = {}
    for file in files:
        other = named.setdefault(file.relative_to(folder).with_suffix(""), file)
        if other is not file:
            raise BadInput(f"{file}: expected one file of this name, got {other.name} as well")
    return named


def _names_in(file: Path) -> list[str] | None:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: expected class names in UTF-8, one a line, got {first_line(error)}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _torchvision(root: Path, layout: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{root}: expected torchvision's layout of {layout}, got {first_line(error)}") from error


def _voc_names() -> list[str]:
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    return ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]


def _voc(root: Path, split: str) -> Split:
    from torchvision.datasets import VOCSegmentation

    found = _torchvision(root, "VOC 2012", lambda: VOCSegmentation(str(root), "2012", split))
    return Split(split, [Path(p) for p in found.images], [Path(p) for p in found.masks], _voc_names())


def _sbd(root: Path, split: str) -> Split:
    from torchvision.datasets import SBDataset

    try:
        found = _torchvision(root, "SBD", lambda: SBDataset(str(root), split, mode="segmentation"))
    except ModuleNotFoundError as error:
        raise BadInput("layout: sbd needs scipy, which reads its masks: run `pip install scipy`") from error

    def read(path: Path) -> Tensor:  # (H, W) int64
        import numpy as np

        return torch.from_numpy(np.array(found._get_target(str(path))).astype(np.int64))

    return Split(split, [Path(p) for p in found.images], [Path(p) for p in found.masks], _voc_names(), read)


def _cityscapes(root: Path, split: str) -> Split:
    from torchvision.datasets import Cityscapes

    found = _torchvision(root, "Cityscapes", lambda: Cityscapes(str(root), split, "fine", "semantic"))
    train_ids = torch.full((256,), 255)
    names = {}
    for entry in Cityscapes.classes:
        if 0 <= entry.train_id < 255:
            train_ids[entry.id] = entry.train_id
            names[entry.train_id] = entry.name

    def read(path: Path) -> Tensor:  # (H, W) int64
        mask = read_mask(path)
        if mask.max() >= len(train_ids):
            raise BadInput(f"{path}: expected Cityscapes' label ids, below {len(train_ids)}, got {int(mask.max())}")
        return train_ids[mask]

    masks = [Path(targets[0]) for targets in found.targets]
    return Split(split, [Path(p) for p in found.images], masks, [names[k] for k in sorted(names)], read)


LAYOUTS = {"folder": _folder, "voc": _voc, "sbd": _sbd, "cityscapes": _cityscapes}


class TrainingSet(Dataset):
    """Augmented images and masks. What comes for a key depends on the key and the seed alone.

    So neither the number of workers nor that of ranks nor an interruption changes what is seen. A file that cannot be
    read comes as the :class:`BadInput` itself: raised in a worker, it would arrive with the worker's traceback.
    """

    def __init__(
        self,
        split: Split,
        augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        seed: int,
    ) -> None:
        self.split, self.augment, self.seed = split, augment, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor] | BadInput:  # (3, h, w) float32, (h, w) int64
        epoch, index, counts = key
        try:
            image, mask = self.split.read(index)
        except BadInput as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_mixed(self.seed, epoch, index))
            image, mask = self.augment(image, mask)
        return image, mask if counts else torch.full_like(mask, self.split.ignore_value)


def _mixed(*numbers: int) -> int:
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def collate(samples: list[tuple[Tensor, Tensor] | BadInput]) -> tuple[Tensor, Tensor] | BadInput:
    """Stack a batch; or what is wrong with its first bad sample."""
    for sample in samples:
        if isinstance(sample, BadInput):
            return sample
    images, masks = zip(*samples)
    return torch.stack(images), torch.stack(masks)


class Order(Sampler):
    """The keys of each step's images on one rank, from step ``first`` to step ``last``.

    Each epoch is a permutation, cut into steps of ``batch`` images over all ranks, the last of them smaller; a rank
    takes every ``world``-th image. One that gets none takes the step's first image without its labels, so that all
    ranks take the same steps.
    """

    def __init__(self, images: int, batch: int, seed: int, first: int, last: int, rank: int = 0, world: int = 1):
        self.images, self.batch, self.seed, self.first, self.last = images, batch, seed, first, last
        self.rank, self.world = rank, world
        self.steps_per_epoch = -(-images // batch)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Key]]:
        shuffled_for, shuffled = -1, []
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != shuffled_for:
                generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
                shuffled_for, shuffled = epoch, torch.randperm(self.images, generator=generator).tolist()
            together = shuffled[position * self.batch : (position + 1) * self.batch]
            mine = together[self.rank :: self.world]
            yield [(epoch, index, True) for index in mine] or [(epoch, together[0], False)]
