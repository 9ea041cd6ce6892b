"""benchmarks/experiment_cascades.py: runs that are killed and go on, and the table of those that are done."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from refinenet_fast.training import checkpoint
from refinenet_fast.training.data import open_split
from training_runs import processes

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
experiment = pytest.importorskip("experiment_cascades", reason="needs the checkout's benchmarks/")

NETWORKS = list(experiment.NETWORKS)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch, one_thread):
    """What the script sets for its whole process."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script, in this process."""
    argv, out, err, code = ["experiment_cascades.py", *map(str, words)], io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = experiment.main()
        except SystemExit as left:
            code = left.code
    return code, out.getvalue(), err.getvalue()


def quick(folder: Path, *words: object) -> tuple[object, ...]:
    """Options of a run of tiny networks in ``folder``; the table goes beside its ``runs``."""
    where = ("--scratch", folder / "runs", "--json", folder / "table.json")
    return ("--quick", "--device", "cpu", "--threads", 1, "--allocator", "default", *where, *words)


def run_until_killed(words: Sequence[object], saves: int) -> None:
    """The script, in a process of its own, until SIGKILL at once after so many checkpoints."""
    saved, done = checkpoint.save, []

    def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
        path = saved(folder, step, state)
        done.append(step)
        if len(done) == saves:
            os.kill(os.getpid(), signal.SIGKILL)
        return path

    checkpoint.save = save
    run(*words)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "table.json").read_text())["rows"]


def scores(folder: Path) -> list[tuple]:
    return [(row["network"], row["seed"], row["miou"], row["iou"]) for row in rows_in(folder)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_resumes_and_a_finished_one_is_not_repeated(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    assert run(*quick(whole, "--seeds", 0, "--runs", 2))[0] == 0

    process = processes().Process(target=run_until_killed, args=(quick(cut, "--seeds", 0), 5))  # three a run
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [row["network"] for row in rows_in(cut)] == NETWORKS[:1]  # the table of what was finished then
    before = (cut / "runs" / "paper-single" / "seed-0" / "result.json").stat().st_mtime_ns

    code, _, err = run(*quick(cut, "--seeds", 0, "--runs", 1))
    assert code == 0 and "resumed after step 6 of 9" in err and "single, seed 0" not in err
    assert (cut / "runs" / "paper-single" / "seed-0" / "result.json").stat().st_mtime_ns == before
    assert scores(cut) == scores(whole) and len(scores(cut)) == 2
    assert not list(cut.rglob("*.pt"))  # of finished runs, nothing to resume is kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """One seed of all networks, two of the first; and what the script printed."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    assert run(*quick(folder, "--seeds", 3, "--epochs", 1))[0] == 0
    code, out, _ = run(*quick(folder, "--seeds", "3,1", "--epochs", 1, "--runs", 1))
    torch.set_num_threads(threads)
    assert code == 0
    return folder, out


def test_the_table_says_what_was_measured(finished):
    folder, out = finished
    rows = rows_in(folder)
    assert [(row["network"], row["seed"]) for row in rows] == [(NETWORKS[0], 1), *((name, 3) for name in NETWORKS)]
    assert (folder / "table.md").read_text() == out
    caption, *lines = out.split("\n\n")[0].splitlines(), *out.splitlines()
    assert "test_resnet, width 8, 1 epochs from scratch, float32; scored on 2 images of 64×48" in caption[0]
    for name, line in zip(NETWORKS, lines[-4:], strict=True):
        mine = [row for row in rows if row["network"] == name]
        found = [100 * row["miou"] for row in mine]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) == 2 else ""
        assert cells[0] == name and cells[1] == f"{mine[0]['parameters'] / 1e6:.1f} M"
        assert cells[2] == ("1, 3" if len(found) == 2 else "3")
        assert cells[3] == f"{sum(found) / len(found):.1f}{spread}"
        assert cells[4] == f"{min(found):.1f}–{max(found):.1f}"
    assert len({row["parameters"] for row in rows}) == 4 and all(row["train_seconds"] > 0 for row in rows)
    one, other = rows[:2]
    assert one["miou"] != other["miou"] and set(one["iou"]) == {"ground", "disc", "square", "triangle", "bar"}


def test_of_a_finished_run_its_settings_and_result_are_enough(finished, tmp_path):
    """Such as on another machine, to which nothing else was taken."""
    folder, out = finished
    for path in (folder / "runs").glob("*/seed-*/*.json"):
        copy = tmp_path / "runs" / path.relative_to(folder / "runs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    code, again, err = run(*quick(tmp_path, "--seeds", 3, "--epochs", 1))
    assert (code, again, err) == (0, out, "") and rows_in(tmp_path) == rows_in(folder)


def test_one_recipe_for_all(finished):
    """The networks of a table differ in the preset alone."""
    rows = rows_in(finished[0])
    assert {row["settings"]["preset"] for row in rows} == set(experiment.NETWORKS.values())
    recipes = [{k: v for k, v in row["settings"].items() if k not in ("preset", "seed")} for row in rows]
    assert all(recipe == recipes[0] for recipe in recipes) and "data" not in recipes[0]


def test_another_recipe_is_refused(finished):
    folder, _ = finished
    before = (folder / "table.json").read_bytes()
    code, _, err = run(*quick(folder, "--seeds", "3,1"))
    assert code == 1 and "epochs: expected 1, as the run in" in err and "got 3" in err
    assert (folder / "table.json").read_bytes() == before


def test_a_table_of_none_and_of_given_scores():
    row = {"network": "4-cascaded", "seed": 0, "parameters": 15_386_955, "size": (180, 240), "images": 101}
    row |= {"device_name": "a CPU", "commit": "abc", "miou": 0.25, "train_seconds": 90.0}
    row["settings"] = {"trunk": "resnet18", "width": 64, "epochs": 6, "precision": "float32"}
    rows = [row, {**row, "seed": 1, "miou": 0.31, "train_seconds": 150.0, "commit": "def"}]
    text = experiment.table(rows)
    assert "| 4-cascaded | 15.4 M | 0, 1 | 28.0 ± 4.2 | 25.0–31.0 | 2.0 |" in text
    assert "commit abc and def." in text and "scored on 101 images of 240×180" in text and "single" not in text
    assert "No run is finished." in experiment.table([])


def test_seconds_are_those_of_all_pieces(tmp_path):
    (tmp_path / "log.csv").write_text("step,seconds,miou\n1,2.5,\n2,4,\n2,,0.5\n")
    assert experiment.seconds_in(tmp_path / "log.csv") == 6.5


def test_halves(tmp_path):
    """Images are averaged, masks keep their values."""
    whole = tmp_path / "whole"
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    labels = np.array([[0, 1, 2, 3, 9, 9]] * 4, dtype=np.uint8)
    for split in ("train", "val"):
        for kind, content in (("images", pixels), ("masks", labels)):
            (whole / kind / split).mkdir(parents=True)
            Image.fromarray(content).save(whole / kind / split / "a.png")
    image, mask = open_split(experiment.halved(whole, tmp_path / "half"), "folder", "val").read(0)
    means = pixels.reshape(2, 2, 3, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(image.numpy() - means).max() <= 1
    assert mask.shape == (2, 3) and set(mask.flatten().tolist()) <= {0, 1, 2, 3, 9} and (mask[:, 2] == 9).all()


@pytest.mark.parametrize("recipe", list(experiment.RECIPES))
def test_recipes_are_settings_that_can_be(recipe, tmp_path):
    """Of every network; with the trunk, the width and the size that the experiment is said to have."""
    args = mock.Mock(recipe=recipe, epochs=None, device="cpu")
    for network in NETWORKS:
        settings = experiment.wanted(network, 0, tmp_path, args)
        expected = {"cpu": ("resnet18", 64, (180, 240)), "cuda": ("resnet50", 256, (360, 480))}
        if recipe in expected:
            assert (settings.trunk, settings.width, settings.crop) == expected[recipe]
        assert not settings.pretrained and dataclasses.asdict(settings)["preset"] == experiment.NETWORKS[network]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "cpu", "--scratch", "x"], "REFINENET_FAST_CAMVID: expected the folder of CamVid, got nothing"),
        (["--quick", "--scratch", "x", "--seeds", "0,a"], "expected whole numbers such as 0,1,2; got '0,a'"),
        (["--quick", "--scratch", "x", "--runs", "0"], "expected a whole number above 0, got '0'"),
        (["--quick"], "the following arguments are required: --scratch"),
    ],
)
def test_bad_options_are_one_line(monkeypatch, words, message):
    monkeypatch.delenv("REFINENET_FAST_CAMVID", raising=False)
    code, out, err = run(*words)
    assert code == 2 and message in err and out == "" and err.count("\n") == 1
    assert not Path("x").exists()


def test_a_folder_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("REFINENET_FAST_CAMVID", str(tmp_path / "nothing"))
    code, _, err = run("--device", "cpu", "--allocator", "default", "--scratch", tmp_path / "runs")
    assert code == 1 and "nothing/images/train: expected a folder, there is none" in err and "Traceback" not in err
