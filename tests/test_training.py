"""RefineNet in a training loop that knows nothing of it: README's, and what people do around it.

On photographs where REFINENET_FAST_CAMVID names a folder of them, on generated scenes otherwise.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from refinenet_fast import RefineNet

pytest.importorskip("timm")
README = Path(__file__).parents[1] / "README.md"
STEPS, CLASSES, IGNORED, SIZE = 30, 11, 255, (64, 96)


def generated() -> tuple[Tensor, Tensor]:  # (2, 3, H, W), (2, H, W) int64
    """Rectangles on noise; a class is a colour, and a border is not labelled."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.randn(CLASSES, 3, generator=generator)
    labels = torch.zeros(2, *SIZE, dtype=torch.int64)
    for scene in labels:
        for label in range(1, CLASSES):
            top, left = (int(torch.randint(side - 24, (), generator=generator)) for side in SIZE)
            scene[top : top + 40, left : left + 40] = label
    images = colours[labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(2, 3, *SIZE, generator=generator)
    labels[:, :2] = IGNORED
    return images, labels


def photographs(folder: Path) -> tuple[Tensor, Tensor]:  # (2, 3, H, W), (2, H, W) int64
    import numpy as np
    from PIL import Image

    images, labels = [], []
    for file in sorted((folder / "images" / "train").glob("*.jpg"))[::200][:2]:
        picture = Image.open(file).convert("RGB").resize(SIZE[::-1])
        mask = Image.open(folder / "masks" / "train" / f"{file.stem}.png").resize(SIZE[::-1], Image.Resampling.NEAREST)
        images.append(torch.tensor(np.array(picture)).permute(2, 0, 1) / 255)
        labels.append(torch.tensor(np.array(mask)).long())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    target = torch.stack(labels)
    target[target >= CLASSES] = IGNORED
    return (torch.stack(images) - mean[:, None, None]) / std[:, None, None], target


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    folder = os.environ.get("REFINENET_FAST_CAMVID")
    return photographs(Path(folder)) if folder else generated()


def network(**options) -> RefineNet:
    torch.manual_seed(0)
    settings = {"trunk": "resnet18", "width": 32, "deep_width": 32, "init": "kaiming", "dropout": 0.1, **options}
    return RefineNet(CLASSES, **settings)


def snippet() -> str:
    """The training loop in README, on a network small enough for a test."""
    if not README.exists():
        pytest.skip("README.md is not beside the tests")
    (code,) = re.findall(r"```python\n([^`]*loss\.backward\(\)[^`]*)```", README.read_text())
    small = 'trunk="resnet18", width=32, deep_width=32, freeze_bn=True'
    changed = code.replace('trunk="resnet50", pretrained=True', small)
    assert small in changed
    return changed


def run_readme(code: str, batch: tuple[Tensor, Tensor]) -> list[float]:
    """The losses of its steps, on one batch that is shown again and again."""
    scope: dict[str, Any] = {}
    losses: list[float] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(STEPS):
            yield batch
            losses.append(scope["loss"].item())

    torch.manual_seed(0)
    scope["loader"] = loader()
    exec(code, scope)
    return losses


def assert_halved(losses: list[float]) -> None:
    assert min(losses[-3:]) <= losses[0] / 2, losses


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_readme(batch, compiled, autocast):
    code = snippet()
    if compiled:
        code, count = re.subn(r"(model\.train\(\).*\n)", r"\1model = torch.compile(model)\n", code)
        assert count == 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_halved(run_readme(code, batch))


def train(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, around=None) -> list[float]:
    """Half a batch at a time with accumulated gradients, which are clipped."""
    losses = []
    for _ in range(STEPS):
        total = 0.0
        optimizer.zero_grad()
        for image, label in zip(*batch, strict=True):
            loss = F.cross_entropy(model(image[None]), label[None], ignore_index=IGNORED) / 2
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0, error_if_nonfinite=True)
        assert norm > 0
        optimizer.step()
        if around:
            around()
        losses.append(total)
    return losses


def test_accumulation_clipping_and_a_moving_average(batch):
    model = network(dropout=0.0).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    optimizer = torch.optim.AdamW(model.param_groups(lr=2e-3, trunk_scale=1.0), lr=2e-3)
    expected = model.classifier.weight.detach().clone()

    def after_each_step() -> None:
        average.update_parameters(model)
        first = average.n_averaged == 1
        expected.copy_(model.classifier.weight if first else 0.8 * expected + 0.2 * model.classifier.weight)

    assert_halved(train(model, batch, optimizer, after_each_step))
    torch.testing.assert_close(average.module.classifier.weight, expected)
    average.eval()
    with torch.no_grad():
        loss = F.cross_entropy(average(batch[0]), batch[1], ignore_index=IGNORED)
    assert loss.isfinite() and not torch.equal(average.module.classifier.weight, model.classifier.weight)


def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    model, (images, labels) = network(dropout=0.0, freeze_bn=True).double().train(), batch
    parameters, images = [p for p in model.parameters() if p.requires_grad], images.double()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, ignore_index=IGNORED, reduction="sum")

    whole = torch.autograd.grad(loss(images, labels), parameters)
    for image, label in zip(images, labels, strict=True):
        loss(image[None], label[None]).backward()
    for p, expected in zip(parameters, whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9)


def test_copies_train_alike(batch):
    """A state dict that went to a file and back, a deep copy and a pickle: the same steps to the bit."""
    model = network(dropout=0.0).train()
    optimizer = torch.optim.SGD(model.param_groups(lr=0.002), momentum=0.9)
    step(model, optimizer, batch)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), network(dropout=0.0).train()]
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    copies[-1].load_state_dict(loaded["model"])
    expected = [step(model, optimizer, batch) for _ in range(2)]
    for other in copies:
        resumed = torch.optim.SGD(other.param_groups(lr=0.002), momentum=0.9)
        resumed.load_state_dict(copy.deepcopy(loaded["optimizer"]))  # else they share their momentum
        assert [step(other, resumed, batch) for _ in range(2)] == expected
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    loss = F.cross_entropy(model(batch[0]), batch[1], ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _rank(rank: int, folder: str, images: Tensor, labels: Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = network(dropout=0.0, freeze_bn=True)
    if rank == 1:  # DDP hands out the weights of rank 0
        nn.init.zeros_(model.classifier.weight)
    parallel = nn.parallel.DistributedDataParallel(model)
    losses = []
    optimizer = torch.optim.AdamW(model.param_groups(lr=2e-3, trunk_scale=1.0), lr=2e-3)
    for k in range(STEPS):
        loss = F.cross_entropy(parallel(images[rank : rank + 1]), labels[rank : rank + 1], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        if k == 0:
            torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, f"{folder}/{rank}.pt")
        optimizer.step()
        losses.append(loss.item())
    torch.save([losses, model.classifier.weight.detach()], f"{folder}/end{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks(tmp_path, batch):
    """DistributedDataParallel over gloo: gradients are the mean over the ranks, who stay together, and it learns."""
    images, labels = batch
    torch.multiprocessing.spawn(_rank, (str(tmp_path), images, labels), nprocs=2)
    model = network(dropout=0.0, freeze_bn=True).train()
    for image, label in zip(images, labels, strict=True):
        (F.cross_entropy(model(image[None]), label[None], ignore_index=IGNORED) / 2).backward()
    for rank in (0, 1):
        grads = torch.load(tmp_path / f"{rank}.pt")
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert (grads[name] - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name
    (first, weight), (second, other) = (torch.load(tmp_path / f"end{rank}.pt") for rank in (0, 1))
    assert torch.equal(weight, other)
    assert_halved([(a + b) / 2 for a, b in zip(first, second, strict=True)])
