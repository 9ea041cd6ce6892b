"""The training loop: steps, validation, checkpoints; the same result however often it is interrupted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from refinenet_fast.training import checkpoint, survey, tensorboard
from refinenet_fast.training.augment import Augment
from refinenet_fast.training.clock import Clock
from refinenet_fast.training.data import Order, TrainingSet, collate
from refinenet_fast.training.distributed import Ranks, default_workers, ranks
from refinenet_fast.training.evaluation import evaluate
from refinenet_fast.training.files import BadInput
from refinenet_fast.training.memory import autocast
from refinenet_fast.training.metrics import scores
from refinenet_fast.training.model_file import load_weights, save_model
from refinenet_fast.training.pictures import save_image, triptych
from refinenet_fast.training.prediction import Segmenter
from refinenet_fast.training.prepare import Data, build_network, open_data, report
from refinenet_fast.training.run_folder import RunFolder
from refinenet_fast.training.settings import LOCAL, TrainSettings
from refinenet_fast.training.survey import Progress


def without_bars(what: str, items: Iterable[Any], total: int) -> Iterable[Any]:
    """The :data:`Progress` that shows nothing."""
    return items


def train(
    settings: TrainSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = lambda line: None,
    progress: Progress = without_bars,
) -> None:
    """Train a network, in the folder ``out``; in each process that torchrun has started, or in this one.

    Args:
        resume: Go on with the run in ``out``, if there is one, from its newest checkpoint.
        overwrite: Replace the run in ``out``.
        say: Called with each line that the user should see, on the first rank.
        progress: Wraps the steps, the validation images and the scanned files, and may show how far they are.

    Raises:
        BadInput: Something given cannot be used; the disk is full; the loss is not finite. The message is one line.
    """
    with ranks(settings.device) as group:
        folder = RunFolder(out)
        tell = say if group.first else lambda line: None
        shown = progress if group.first else without_bars
        group.check_same({name: value for name, value in settings.to_json().items() if name not in LOCAL})
        group.on_first(lambda: folder.check(settings, resume, overwrite))
        if settings.tensorboard:
            tensorboard.check_installed()
        data = open_data(settings, group, shown)
        model, description = build_network(settings, data, group)
        group.on_first(lambda: folder.claim(settings, resume, overwrite))
        if group.first:
            for line in report(settings, data, model, group, out):
                tell(line)
        Trainer(settings, folder, data, model, description, group, tell, shown).run()


class Trainer:
    """One run on one rank: what changes from step to step, and what is done with it."""

    def __init__(
        self,
        settings: TrainSettings,
        folder: RunFolder,
        data: Data,
        model: Any,
        description: Any,
        group: Ranks,
        say: Callable[[str], object],
        progress: Progress,
    ) -> None:
        self.settings, self.folder, self.data, self.group = settings, folder, data, group
        self.model, self.description, self.say, self.progress = model, description, say, progress
        self.steps_per_epoch = -(-len(data.train) // settings.batch)
        self.steps = settings.epochs * self.steps_per_epoch
        self.step, self.best = 0, -math.inf
        self.optimizer = _optimizer(settings, model)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, self.steps, settings.power)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=settings.precision == "float16")
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        if not settings.ema:
            self.average = None
        self.weight = self._class_weights()
        torch.manual_seed(settings.seed + group.rank)  # dropout differs between ranks
        self._restore()
        group.check_same({"step": self.step})
        if group.first:
            folder.cut_log(self.step)
        self.events = tensorboard.Events(folder.events, self.step) if settings.tensorboard and group.first else None
        # After the weights are restored: it hands out those of the first rank.
        self.parallel = DistributedDataParallel(model, broadcast_buffers=False) if group.world > 1 else model
        self.forward = torch.compile(self.parallel) if settings.compile else self.parallel

    def _class_weights(self) -> Tensor | None:  # (K,)
        if self.settings.class_weights == "none":
            return None
        pixels = self.data.surveys[self.data.train.name].pixels.clone()
        if self.settings.ignore_value < len(pixels):
            pixels[self.settings.ignore_value] = 0
        weights = survey.class_weights(pixels, self.data.train.num_classes, self.settings.class_weights)
        return torch.tensor(weights, dtype=self.model.classifier.weight.dtype, device=self.group.device)

    @property
    def network(self) -> Any:
        """What is scored and kept: the moving average, if there is one."""
        return self.model if self.average is None else self.average.module

    # -- training -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        # Where float16 overflows, the scaler leaves a step of the optimizer out, and the scheduler goes on.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        self.model.train()
        self.clock = Clock()
        for images, labels in self.progress("train", self._batches(), self.steps - self.step):
            lr = self.optimizer.param_groups[-1]["lr"]
            loss = self._update(images, labels)
            self.step += 1
            ends = self.step % self.steps_per_epoch == 0
            saves = ends or (self.settings.save_every and self.step % self.settings.save_every == 0)
            if saves or self.step % self.settings.log_every == 0:
                value = self._finite(loss)
                seconds, waited = self.clock.lap()
                self._log(loss=value, lr=lr, seconds=seconds, waited=waited)
            with self.clock.paused():
                if ends and self._validates():
                    self._validate()
                if saves:
                    self._save()
        self.say(self.clock.summary())
        if self.events is not None:
            self.events.close()
        if self.group.first:
            save_model(self.folder.last, self.network, self.description)
            if self.data.val is None or not self.folder.best.exists():
                save_model(self.folder.best, self.network, self.description)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images and labels, on its device, from the next step to the last."""
        s, group = self.settings, self.group
        augment = Augment(
            s.crop, s.scales, s.flip, s.colour, s.ignore_value, self.description.mean, self.description.std
        )
        order = Order(len(self.data.train), s.batch, s.seed, self.step, self.steps, group.rank, group.world)
        loader: Iterable[Any] = DataLoader(
            TrainingSet(self.data.train, augment, s.seed),
            batch_sampler=order,
            collate_fn=collate,
            num_workers=default_workers(group) if s.workers is None else s.workers,
            pin_memory=group.device.type == "cuda",
            generator=torch.Generator(),  # the seed of its workers, drawn where it begins, is none of dropout's numbers
        )
        for batch in self.clock.waiting(loader):
            if isinstance(batch, BadInput):
                raise batch
            images, labels = (t.to(group.device, non_blocking=True) for t in batch)
            yield images.to(self.model.classifier.weight.dtype), labels

    def _update(
        self,
        images: Tensor,  # (N, 3, h, w)
        labels: Tensor,  # (N, h, w) int64
    ) -> Tensor:  # () the mean over the labelled pixels of all ranks
        """One step of the optimizer, its images run in parts.

        The sum over a part is divided by the labelled pixels (or their weights) of all parts on all ranks, so that the
        gradient is that of the whole step, however it is divided up.
        """
        group, settings = self.group, self.settings
        total = group.sum(self._labelled(labels)).clamp(min=torch.finfo(torch.float64).tiny)
        summed = torch.zeros((), dtype=torch.float64, device=group.device)
        parts = min(settings.accumulate, len(images))
        for k, (some, truth) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts))):
            with self._together(k == parts - 1):
                with autocast(group.device.type, settings.precision):
                    logits = self.forward(some)
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = F.cross_entropy(
                    logits.to(wide), truth, self.weight, ignore_index=settings.ignore_value, reduction="sum"
                )
                # DistributedDataParallel takes the mean over the ranks.
                self.scaler.scale(loss * (group.world / total).to(loss.dtype)).backward()
            summed += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return group.sum(summed) / total

    def _together(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are summed over the ranks after a step's last part."""
        return nullcontext() if last or self.group.world == 1 else self.parallel.no_sync()

    def _labelled(
        self,
        labels: Tensor,  # (N, h, w) int64
    ) -> Tensor:  # () float64
        counted = labels[labels != self.settings.ignore_value]
        if self.weight is None:
            return torch.tensor(counted.numel(), dtype=torch.float64, device=labels.device)
        return self.weight.double()[counted].sum()

    def _finite(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise BadInput(f"step {self.step}: expected a finite loss, got {value}; a lower --lr may help")
        return value

    def _validates(self) -> bool:
        """Whether the epoch that has ended is one of those that are validated."""
        last = self.step == self.steps
        return self.data.val is not None and (last or self._epoch() % self.settings.val_every == 0)

    def _log(self, **values: float) -> None:
        if self.group.first:
            rounded = {k: f"{v:.17g}" if k == "loss" else f"{v:.6g}" for k, v in values.items()}
            self.folder.write_log({"step": self.step, "epoch": self._epoch(), **rounded})
        if self.events is not None:
            self.events.scalars(self.step, values)

    def _epoch(self) -> int:
        return -(-self.step // self.steps_per_epoch)

    # -- validation and files -------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Score the validation split on all ranks; keep a picture, and the network if it is the best so far."""
        self._average_buffers()
        segment = Segmenter(self.network.eval(), self.description)
        shown: list[Any] = []

        def show(index: int, image: Tensor, truth: Tensor, predicted: Tensor) -> None:
            if index == 0:
                shown.append(triptych(image, truth, predicted, self.description.num_classes))

        matrix = evaluate(
            segment,
            self.data.val,
            self.settings.ignore_value,
            workers=0 if self.settings.workers == 0 else 1,
            rank=self.group.rank,
            world=self.group.world,
            progress=lambda items, total: self.progress("validate", items, total),
            show=show,
        )
        matrix = self.group.sum(matrix.to(self.group.device)).cpu()
        self.model.train()
        found = scores(matrix, self.description.class_names)
        found = {k: math.nan if found[k] is None else found[k] for k in ("miou", "pixel_accuracy", "mean_accuracy")}
        if self.group.first:
            save_image(self.folder.previews / f"epoch-{self._epoch():04d}.png", shown[0])
        if self.events is not None:
            self.events.picture(self.step, shown[0])
        self._log(**found)
        self.say(f"epoch {self._epoch()}: mIoU {found['miou']:.4f}, pixel accuracy {found['pixel_accuracy']:.4f}")
        if found["miou"] > self.best:
            self.best = found["miou"]
            if self.group.first:
                save_model(self.folder.best, self.network, self.description)

    @torch.no_grad()
    def _average_buffers(self) -> None:
        """Live batch norm has seen other images on each rank: its statistics become their mean, in ``average`` too."""
        networks = [self.model] if self.average is None else [self.model, self.average]
        if self.group.world > 1:
            for buffer in (buffer for network in networks for buffer in network.buffers()):
                if buffer.dtype.is_floating_point:
                    self.group.sum(buffer).div_(self.group.world)

    def _save(self) -> None:
        self._average_buffers()
        random_states = self.group.gather(checkpoint.random_state())
        if not self.group.first:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "order": self._order(),
            "random": random_states,
            "best": self.best,
            "tables": checkpoint.tables_hash(),
        }
        checkpoint.save(self.folder.checkpoints, self.step, state)

    def _order(self) -> dict[str, list[str]]:
        """What the order and the meaning of what is seen depend on, beside the settings."""
        return {"images": [p.name for p in self.data.train.images], "classes": self.data.class_names}

    def _restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        state = checkpoint.load_newest(self.folder.checkpoints, self.say)
        if state is None:
            return
        for what, now in self._order().items():
            begun = state["order"].get(what, now)  # checkpoints used to have no classes
            if begun != now:
                before, after = next(pair for pair in zip_longest(begun, now, fillvalue="none") if pair[0] != pair[1])
                raise BadInput(
                    f"{self.settings.data}: expected the {what} that the run has begun with, got {after} for {before}"
                )
        if len(state["random"]) != self.group.world:
            raise BadInput(f"resume: expected {len(state['random'])} processes, as before, got {self.group.world}")
        if state["tables"] != checkpoint.tables_hash():
            self.say("the tables of what runs each convolution have changed: what follows is rounded differently")
        self.step, self.best = state["step"], state["best"]
        source = checkpoint.path_of(self.folder.checkpoints, self.step)
        load_weights(self.model, state["model"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            load_weights(self.average, state["average"] or {}, source)
        checkpoint.set_random_state(state["random"][self.group.rank])
        self.say(f"resumed after step {self.step} of {self.steps}")


def _optimizer(settings: TrainSettings, model: Any) -> torch.optim.Optimizer:
    groups = model.param_groups(settings.lr, settings.trunk_scale, settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=settings.momentum)
