"""That options of a training run do what they say, and that what it shows and says is so."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from safetensors.torch import load_file

from refinenet_fast import RefineNet
from refinenet_fast.training import checkpoint
from refinenet_fast.training.files import BadInput, read_image, read_mask
from refinenet_fast.training.loop import train
from refinenet_fast.training.model_file import load_model
from refinenet_fast.training.pictures import palette
from refinenet_fast.training.prediction import Segmenter
from training_runs import losses, samples, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("data") / "samples")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
def test_the_network_runs_in_the_precision_that_is_asked_for(data, tmp_path, precision):
    seen = set()

    def note(module: torch.nn.Module, images: tuple, logits: torch.Tensor) -> None:
        if isinstance(module, RefineNet):
            seen.add(logits.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        train(settings(data, epochs=1, val_split="", precision=precision), tmp_path / "run")
    finally:
        hook.remove()
    assert seen == {getattr(torch, precision)}


def test_the_moving_average_is_that_of_the_steps(data, tmp_path, monkeypatch):
    """Worked out from the weights after each step: the first as they are, then 0.75 of the mean and 0.25 of the new."""
    saved, steps = checkpoint.save, []

    def note(folder: Path, step: int, state: dict) -> Path:
        steps.append({key: value.clone() for key, value in state["model"].items()})
        return saved(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", note)
    train(settings(data, val_split="", ema=0.75, save_every=1), tmp_path / "run")
    kept = load_file(tmp_path / "run" / "last.safetensors")
    assert len(steps) == 6 and not torch.equal(kept["classifier.weight"], steps[-1]["classifier.weight"])
    for key in (key for key, value in kept.items() if value.is_floating_point()):
        expected = steps[0][key]
        for state in steps[1:]:
            expected = 0.75 * expected + 0.25 * state[key]
        torch.testing.assert_close(kept[key], expected, msg=lambda text, key=key: f"{key}: {text}")


def test_colour_changes_what_is_trained_on(data, tmp_path):
    first = {}
    for colour in (0.0, 0.3):
        train(settings(data, epochs=1, val_split="", colour=colour), tmp_path / str(colour))
        first[colour] = losses(tmp_path / str(colour))[0]
    assert first[0.0] != first[0.3]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_stays_as_it_began(data, tmp_path, frozen):
    train(settings(data, epochs=1, val_split="", freeze_bn=frozen), tmp_path / "run")
    means = [value for key, value in load_file(tmp_path / "run" / "last.safetensors").items() if "running_mean" in key]
    assert means and all(bool(mean.any()) is not frozen for mean in means)  # which is at 0


def test_what_is_said_first_are_the_numbers(data, tmp_path):
    said: list[str] = []
    train(settings(data, epochs=1), tmp_path / "run", say=said.append)
    masks = torch.stack([read_mask(file) for file in (data / "masks" / "train").iterdir()])
    shares = [100 * (masks == value).double().mean() for value in (0, 1, 2, 3, 4, 255)]
    classes = ("ground", "disc", "square", "triangle", "bar", "unlabelled")
    expected = "classes: 5: " + ", ".join(f"{name} {share:.1f} %" for name, share in zip(classes, shares))
    parameters = sum(p.numel() for p in load_model(tmp_path / "run")[0].parameters())
    assert said[:5] == [
        "train: 5 images of 64x48 (5)",
        "val: 2 images of 64x48 (2)",
        expected,
        f"network: pytorch-port on test_resnet, {parameters / 1e6:.1f} million parameters",
        f"runs on: CPU, 1 of {os.cpu_count()} cores, backend cpu, float32, 1 process(es)",
    ]


def test_a_preview_is_the_input_the_truth_and_the_prediction(data, tmp_path):
    train(settings(data, epochs=1), tmp_path / "run")
    shown = read_image(tmp_path / "run" / "previews" / "epoch-0001.png").permute(1, 2, 0).numpy()
    image = read_image(data / "images" / "val" / "000.png")
    truth = read_mask(data / "masks" / "val" / "000.png").numpy()
    predicted = Segmenter(*load_model(tmp_path / "run"))(image).numpy()
    left, middle, right = np.split(shown, 3, axis=1)
    assert np.array_equal(left, image.permute(1, 2, 0).numpy())
    assert np.array_equal(middle, palette(5)[truth])
    assert (right == palette(5)[predicted]).all(2).mean() > 0.99 > (right == middle).all(2).mean()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_tensorboards_events_in_one_line(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    from refinenet_fast.training.tensorboard import Events

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # which a run that fails leaves changed
    events = Events(tmp_path, 0)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    with pytest.raises(BadInput, match=f"{tmp_path}: cannot be written: the disk is full"):
        for step in range(1000):
            events.scalars(step, {"loss": 1.0})
            time.sleep(0.01)
    with pytest.raises(BadInput, match="the disk is full"):
        events.close()
    assert "Traceback" not in capfd.readouterr().err
