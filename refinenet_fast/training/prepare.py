"""What a training run starts with: its data, its network, and a word to the user on both."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from refinenet_fast.backends import choose
from refinenet_fast.model import RefineNet
from refinenet_fast.training import survey
from refinenet_fast.training.data import Split, open_split
from refinenet_fast.training.distributed import Ranks
from refinenet_fast.training.files import BadInput
from refinenet_fast.training.memory import AUTOCAST, step_bytes
from refinenet_fast.training.model_file import Description, load_weights, read_model
from refinenet_fast.training.settings import TrainSettings
from refinenet_fast.training.survey import Progress, Survey


@dataclass(frozen=True)
class Data:
    """The splits of a run, and what a scan found in them.

    Attributes:
        surveys: By split; empty without a scan.
    """

    train: Split
    val: Split | None
    surveys: dict[str, Survey]

    @property
    def class_names(self) -> list[str]:
        return self.train.class_names or [str(k) for k in range(self.train.num_classes)]


def open_data(settings: TrainSettings, group: Ranks, progress: Progress) -> Data:
    """List the data on every rank; scan it, a share on each, so that none waits for another longer than it may.

    Raises:
        BadInput: Something is wrong with it; says in which file.
    """

    def opened(name: str) -> Split:
        split = replace(open_split(settings.data, settings.layout, name), ignore_value=settings.ignore_value)
        return survey.decide_classes(split, settings.num_classes)

    names = [settings.train_split, *([settings.val_split] if settings.val_split else [])]
    group.on_first(lambda: [opened(name) for name in names] and None)
    splits = {name: opened(name) for name in names}
    group.check_same({f"{name} images": f"{len(split)} ({_digest(split)})" for name, split in splits.items()})
    group.check_same({"classes": splits[settings.train_split].class_names})

    def scanned() -> dict[str, Survey]:
        if not settings.scan:
            return {}
        return {name: survey.scan(split, progress, group.rank, group.world) for name, split in splits.items()}

    parts = group.on_each(scanned)
    surveys = {name: survey.total(part[name] for part in parts) for name in parts[0]}
    train = splits[settings.train_split]
    if train.num_classes is None:
        if not surveys:
            raise BadInput("num_classes: expected a number where masks are not scanned, got none")
        count = survey.infer_classes(surveys.values(), settings.ignore_value)
        splits = {name: replace(split, num_classes=count) for name, split in splits.items()}
    if settings.class_weights != "none" and not surveys:
        raise BadInput(f"class_weights: expected none where masks are not scanned, got {settings.class_weights}")
    return Data(splits[settings.train_split], splits.get(settings.val_split), surveys)


def _digest(split: Split) -> str:
    return hashlib.blake2b("\n".join(path.name for path in split.images).encode(), digest_size=4).hexdigest()


def build_network(settings: TrainSettings, data: Data, group: Ranks) -> tuple[RefineNet, Description]:
    """The network at the start of training, on the run's device.

    Raises:
        BadInput: A setting does not fit; the pretrained weights cannot be had; ``weights`` are of another network.
    """
    import timm

    torch.manual_seed(settings.seed)
    arguments = settings.network()
    pretrained = settings.pretrained and settings.weights is None
    try:
        model = RefineNet(
            data.train.num_classes,
            pretrained=pretrained,
            recompute_units=settings.recompute,
            checkpoint_blocks=settings.checkpoint_blocks,
            **arguments,
        )
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise BadInput(" ".join(str(error).split())) from error
    if settings.weights is not None:
        load_weights(model, read_model(settings.weights)[0], settings.weights)
    if settings.precision == "float64":
        model.double()
    config = timm.get_pretrained_cfg(model.trunk_name)
    mean, std = (list(c) for c in ((config.mean, config.std) if config else ((0.5,) * 3, (0.5,) * 3)))
    model.to(group.device).to(memory_format=torch.channels_last)
    return model, Description(arguments, data.class_names, mean, std, settings.val_scale)


def report(settings: TrainSettings, data: Data, model: RefineNet, group: Ranks, out: Path) -> list[str]:
    """What is told before training starts, a line each."""
    lines = [f"{split.name}: {len(split)} images" + _sizes(data, split) for split in (data.train, data.val) if split]
    lines += [f"classes: {len(data.class_names)}" + _shares(settings, data)]
    parameters = sum(p.numel() for p in model.parameters())
    lines += [f"network: {settings.preset} on {model.trunk_name}, {parameters / 1e6:.1f} million parameters"]
    dtype = AUTOCAST.get(settings.precision, model.classifier.weight.dtype)
    backend = choose.resolve("rcu", torch.empty(0, dtype=dtype, device=group.device))
    lines += [f"runs on: {_device_name(group)}, backend {backend}, {settings.precision}, {group.world} process(es)"]
    lines += [f"expected memory: {memory(settings, model, group) / 2**30:.2f} GiB on each device, while training"]
    return [*lines, f"results: {out}"]


def _sizes(data: Data, split: Split) -> str:
    if split.name not in data.surveys:
        return ", not scanned"
    counted = data.surveys[split.name].sizes.most_common(3)
    more = len(data.surveys[split.name].sizes) - len(counted)
    sizes = ", ".join(f"{width}x{height} ({count})" for (height, width), count in counted)
    return f" of {sizes}" + (f" and {more} other sizes" if more else "")


def _shares(settings: TrainSettings, data: Data) -> str:
    if data.train.name not in data.surveys:
        return ""
    pixels = data.surveys[data.train.name].pixels.double()
    names = data.class_names
    unlabelled = settings.ignore_value
    shares = (100 * pixels / pixels.sum()).tolist()
    labelled = [(name, shares[k] if k < len(shares) and k != unlabelled else 0.0) for k, name in enumerate(names)]
    parts = [f"{name} {share:.1f} %" for name, share in labelled]
    parts += [f"unlabelled {shares[unlabelled] if unlabelled < len(shares) else 0.0:.1f} %"]
    return ": " + ", ".join(parts)


def _device_name(group: Ranks) -> str:
    if group.device.type == "cuda":
        return torch.cuda.get_device_name(group.device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def memory(settings: TrainSettings, model: RefineNet, group: Ranks) -> int:
    """Bytes that training is expected to hold: weights, the optimizer's state, and the peak of a step's tensors.

    What a framework holds beside tensors, and kernels while they run, is not in it.
    """
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = {"sgd": 1 if settings.momentum else 0, "adamw": 2}[settings.optimizer]
    images = -(-settings.batch // (group.world * settings.accumulate))
    step = step_bytes(model, images, settings.crop, settings.precision)
    return weights * (2 if settings.ema else 1) + trained * states + step
