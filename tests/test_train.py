"""Training runs in one process: what they compute, what they write, what they refuse."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from safetensors.torch import load_file

from refinenet_fast import RefineNet
from refinenet_fast.training import checkpoint, clock, survey
from refinenet_fast.training.data import open_split
from refinenet_fast.training.files import BadInput, read_json
from refinenet_fast.training.loop import Trainer, train
from refinenet_fast.training.model_file import Description, load_model, save_model
from refinenet_fast.training.samples import write_samples
from refinenet_fast.training.settings import TrainSettings
from training_runs import assert_same_weights, log, losses, samples, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("data") / "samples")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# -- what a run does ----------------------------------------------------------------------------------------------


def test_a_run_and_what_it_leaves(data, tmp_path):
    said: list[str] = []
    train(settings(data), tmp_path / "run", say=said.append)
    text = "\n".join(said)
    for expected in ("train: 5 images of 64x48 (5)", "classes: 5: ground", "million parameters", "backend cpu", "GiB"):
        assert expected in text
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["epoch"] for row in rows if row["miou"]] == ["1", "2"]
    assert names(tmp_path / "run" / "previews") == ["epoch-0001.png", "epoch-0002.png"]
    assert names(tmp_path / "run" / "checkpoints") == ["step-00000003.pt", "step-00000006.pt"]
    model, description = load_model(tmp_path / "run")
    assert not model.training and description.class_names == ["ground", "disc", "square", "triangle", "bar"]
    assert TrainSettings.from_json(read_json(tmp_path / "run" / "settings.json")) == settings(data)


def test_it_learns(data, tmp_path):
    train(
        settings(data, epochs=25, batch=5, dropout=0.0, trunk_scale=1.0, optimizer="adamw", lr=2e-3), tmp_path / "run"
    )
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) / 5 < 0.6 * found[0], found


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"precision": "float16", "optimizer": "adamw", "lr": 1e-3},
        {"ema": 0.5, "accumulate": 2, "class_weights": "balanced", "colour": 0.3},
        {"freeze_bn": True, "save_every": 1, "workers": 1, "val_scale": 0.5},
        {"preset": "paper-2-scale", "trunk_stride": "3x3", "class_weights": "log", "crop": (64, 64)},
        {"val_split": "", "num_classes": 5, "scan": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(data, tmp_path, options):
    train(settings(data, epochs=1, **options), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_every_third_epoch_and_the_last_are_validated(data, tmp_path):
    wanted = settings(data, epochs=4, val_every=3)
    train(wanted, tmp_path / "run")
    assert [row["epoch"] for row in log(tmp_path / "run") if row["miou"]] == ["3", "4"]
    train(dataclasses.replace(wanted, val_every=1), tmp_path / "each")
    assert len([row for row in log(tmp_path / "each") if row["miou"]]) == 4
    assert_same_weights(tmp_path / "run", tmp_path / "each")


@pytest.mark.parametrize("stride", ["3x3", "1x1"])
def test_the_trunks_stride_is_what_is_asked_for(stride):
    wanted = settings(Path("data"), preset="paper", trunk="resnet50", trunk_stride=stride).network()
    assert wanted["trunk_stride"] == stride
    assert settings(Path("data"), preset="paper").network()["trunk_stride"] == "1x1"  # the preset's
    assert "trunk_stride" not in settings(Path("data"), preset="light-weight").network()


@pytest.mark.parametrize("weighting", survey.WEIGHTINGS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_pytorchs_mean_over_the_whole_step(data, tmp_path, monkeypatch, weighting, accumulate):
    """And its gradient, in which parts of two, one and one images count by their labelled pixels' weights."""
    split = open_split(data, "folder", "train")
    pixels = torch.stack([split.read(k)[1] for k in range(len(split))]).flatten().bincount()[:5]  # without 255
    weight = None
    if weighting != "none":
        weight = torch.tensor(survey.class_weights(pixels, 5, weighting), dtype=torch.float64)
    expected, update = [], Trainer._update

    def compared(self, images, labels):
        bias = self.model.classifier.bias
        loss = F.cross_entropy(self.model(images), labels, weight, ignore_index=255)
        (gradient,) = torch.autograd.grad(loss, bias)
        after = bias.detach() - self.optimizer.param_groups[-1]["lr"] * gradient
        found = update(self, images, labels)
        torch.testing.assert_close(bias.detach(), after, rtol=1e-12, atol=1e-15)
        expected.append(loss.item())
        return found

    monkeypatch.setattr(Trainer, "_update", compared)
    exact = {"dropout": 0.0, "freeze_bn": True, "precision": "float64", "momentum": 0.0, "weight_decay": 0.0}
    wanted = settings(data, epochs=1, batch=4, val_split="", class_weights=weighting, accumulate=accumulate, **exact)
    train(wanted, tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-12) and len(expected) == 2


def test_the_moving_average_is_what_is_kept(data, tmp_path):
    for name, ema in (("plain", 0.0), ("frozen", 1.0)):
        train(settings(data, epochs=1, val_split="", ema=ema), tmp_path / name)
    plain, frozen = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "frozen"))
    state = checkpoint.load_newest(tmp_path / "frozen" / "checkpoints", print)
    assert all(torch.equal(value, state["model"][key]) for key, value in plain.items())
    assert not torch.equal(plain["classifier.weight"], frozen["classifier.weight"])


def test_accumulation_changes_nothing(data, tmp_path):
    """With batch norm frozen and no dropout, parts of a step add up to the whole."""
    for name, accumulate in (("whole", 1), ("parts", 3)):
        exact = {"freeze_bn": True, "dropout": 0.0, "precision": "float64", "class_weights": "log"}
        train(settings(data, batch=4, accumulate=accumulate, **exact), tmp_path / name)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-10)


def test_compiled(data, tmp_path, monkeypatch):
    """What torch.compile returns is what every step runs; tests/test_ranks.py compiles."""
    ran = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda images: ran.append(model) or model(images))
    train(settings(data, epochs=1, val_split="", compile=True, accumulate=2), tmp_path / "run")
    assert len(ran) == 5  # images of 2, 2, 1 in parts of one


def test_tensorboard_has_what_the_log_has(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(settings(data, tensorboard=True), tmp_path / "run")
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = losses(tmp_path / "run")
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(logged)
    assert [event.step for event in found.Scalars("loss")] == list(range(1, 1 + len(logged)))
    assert [event.step for event in found.Scalars("miou")] == [3, 6]
    assert len(found.Images("input, truth, prediction")) == 2


def test_without_tensorboard_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadInput, match=r"pip install 'refinenet_fast\[tensorboard\]'"):
        train(settings(data, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_keep_up(tmp_path, monkeypatch):
    """At the default number of workers: of images of 360x480, a step waits for data under 5 percent of its time."""
    torch.set_num_threads(os.cpu_count() or 1)
    write_samples(tmp_path / "samples", 16, 1, (360, 480))
    wanted = settings(
        tmp_path / "samples", trunk="resnet18", width=32, crop=(256, 256), batch=4, workers=None, colour=0.3, epochs=3
    )
    said: list[str] = []
    train(wanted, tmp_path / "run", say=said.append)
    rows = [row for row in log(tmp_path / "run") if row["seconds"]][1:]  # while the first batch is made, workers start
    share = sum(float(row["waited"]) for row in rows) / sum(float(row["seconds"]) for row in rows)
    assert share < 0.05
    (line,) = [line for line in said if "waiting for data" in line]
    assert float(re.search(r"([\d.]+) % of them", line)[1]) == pytest.approx(100 * share, abs=1)


def test_a_clock_tells_waiting_from_working(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def slowly(waits: list[float]) -> Iterator[float]:
        for seconds in waits:
            now[0] += seconds
            yield seconds

    counted, laps = clock.Clock(), []
    for _ in counted.waiting(slowly([8.0, 1.0, 2.0])):
        now[0] += 4.0
        with counted.paused():
            now[0] += 100.0
        laps.append(counted.lap())
    assert laps == [(12.0, 8.0), (5.0, 1.0), (6.0, 2.0)]
    assert (counted.seconds, counted.waited, counted.share) == (15.0, 3.0, 0.2)  # without the first batch
    assert counted.summary() == "trained for 15.0 s, 20.0 % of them waiting for data; more --workers may help"


# -- what is refused ----------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_needs_a_word(data, tmp_path):
    wanted = settings(data, epochs=1)
    train(wanted, tmp_path / "run")
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    with pytest.raises(BadInput, match="holds a run; --resume goes on with it, --overwrite replaces it"):
        train(wanted, tmp_path / "run")
    with pytest.raises(BadInput, match=r"lr: expected 0.005, as the run in .* has, got 1.0"):
        train(dataclasses.replace(wanted, lr=1.0), tmp_path / "run", resume=True)
    with pytest.raises(BadInput, match=r"there is none"):
        train(settings(tmp_path / "no-data"), tmp_path / "run", overwrite=True)
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(dataclasses.replace(wanted, epochs=1, lr=0.01), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_weights_of_another_network_are_named(data, tmp_path):
    arguments = {"trunk": "test_resnet", "width": 16, "deep_width": 16, "crp_stages": 4}
    model = RefineNet(5, **arguments)
    save_model(tmp_path / "other.safetensors", model, Description(arguments, list("abcde"), [0.5] * 3, [0.5] * 3))
    with pytest.raises(BadInput, match=r"\d+ keys that differ: .*weight is \(16, .*, expected \(8, ") as error:
        train(settings(data, weights=tmp_path / "other.safetensors"), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match=r"num_classes: expected 5, as .* has, got 7"):
        load_model(tmp_path / "other.safetensors", num_classes=7)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="expected a model file that"):
        load_model(tmp_path / "other.safetensors")


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    with pytest.raises(BadInput, match=r"step \d+: expected a finite loss, got (nan|inf); a lower --lr may help"):
        train(settings(data, lr=1e30, epochs=4), tmp_path / "run")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr: expected more than 0, got -1.0"),
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"val_every": 0}, "val_every: expected 1 or more, got 0"),
        ({"trunk_stride": "2x2"}, "trunk_stride: expected one of 3x3, 1x1, got '2x2'"),
        ({"trunk_stride": "1x1", "trunk": "resnet18"}, "trunk_stride: expected '3x3' for trunk 'resnet18', which"),
        ({"optimizer": "lion"}, "optimizer: expected one of sgd, adamw, got 'lion'"),
        ({"scales": (2.0, 1.0)}, r"scales: expected two positive factors, the smaller first, got \(2.0, 1.0\)"),
        ({"crop": (32, 32)}, "crop: expected more than 32 pixels where batch norm is not frozen, got"),
        ({"crop": (54, 54), "preset": "paper-2-scale"}, "crop: expected more than 54 pixels where batch norm is not"),
        ({"device": "abacus"}, "device: expected auto, cpu, cuda or cuda:<n>, got 'abacus'"),
        ({"trunk": "resnet19"}, "trunk: expected the name of a timm model, got 'resnet19'; similar names"),
        ({"num_classes": 3}, "num_classes: expected 5, as many as the data set names, got 3"),
        ({"class_weights": "balanced", "scan": False}, "class_weights: expected none where masks are not scanned"),
    ],
)
def test_settings_that_cannot_be(data, tmp_path, options, message):
    with pytest.raises(BadInput, match=message) as error:
        train(settings(data, **options), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_without_a_scan_a_wrong_value_is_named_when_it_is_read(tmp_path):
    import numpy as np
    from PIL import Image

    data = samples(tmp_path / "samples", train=2, val=1)
    mask = data / "masks" / "train" / "001.png"
    Image.fromarray(np.full_like(np.array(Image.open(mask)), 200)).save(mask)
    with pytest.raises(BadInput, match=r"001\.png: expected classes 0 to 4, or 255 where unlabelled, got 200"):
        train(settings(data, scan=False, workers=1), tmp_path / "run")
