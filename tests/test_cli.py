"""The command ``refinenet-fast``: README's three commands, every bad input as one line, what is imported when."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("torchvision")
pytest.importorskip("timm")

from PIL import Image

from refinenet_fast import RefineNet, cli, use_backend
from refinenet_fast.backends import table
from refinenet_fast.training.settings import TrainSettings, option_types
from training_runs import losses, samples

SMALL = "--trunk test_resnet --no-pretrained --width 8 --crop 40 40 --batch 2 --epochs 1 --workers 0 --device cpu"


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        arguments = [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
        monkeypatch.setattr(sys, "argv", ["refinenet-fast", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.run()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A data set and a run on it."""
    from refinenet_fast.training.loop import train
    from training_runs import settings

    folder = tmp_path_factory.mktemp("trained")
    data = samples(folder / "samples", 3, 2)
    train(settings(data, epochs=1), folder / "run")
    return data, folder / "run"


DOCUMENTED = Path(__file__).parents[1] / "docs" / "training.md"


@pytest.mark.skipif(not DOCUMENTED.exists(), reason="docs/ is not beside the tests")
@pytest.mark.parametrize("trunk", ["resnet18", "resnet34"])
def test_the_documented_recipes_are_commands(command, monkeypatch, tmp_path, trunk):
    """Taken as they are, on a folder that is not there: that alone is wrong. The networks they name can be built."""
    from refinenet_fast.training import loop

    found, opened = [], loop.open_data
    monkeypatch.setattr(loop, "open_data", lambda settings, *rest: found.append(settings) or opened(settings, *rest))
    section = DOCUMENTED.read_text().split("### CamVid from scratch")[1].split("\n## ")[0]
    (words,) = [found for found in re.findall(r"timeout \d+ refinenet-fast (.*?)\n\n", section, re.S) if trunk in found]
    words = words.replace("\\\n", " ").replace('"$REFINENET_FAST_CAMVID"', str(tmp_path / "none"))
    words = words.replace("--out runs/", f"--out {tmp_path}/runs/").replace("--device cuda", "--device cpu")
    code, _, err = command(words)
    assert code == 1 and "none/images/train: expected a folder, there is none" in err
    (settings,) = found
    assert settings.num_classes == settings.ignore_value == 11 and not settings.pretrained
    assert settings.trunk == trunk and not (tmp_path / "runs").exists()
    RefineNet(11, **settings.network())


def test_from_nothing_to_a_mask(command, tmp_path):
    samples, run = tmp_path / "samples", tmp_path / "run"
    assert command("sample-data", samples, "--train 3 --val 2 --height 48 --width 64")[0] == 0
    code, _, err = command("train", samples, "--out", run, SMALL)
    assert code == 0 and "epoch 1: mIoU" in err
    assert command("train", "--resume --out", run)[0] == 0
    assert command("evaluate", samples, "--model", run, "--out", tmp_path / "scores", "--flip --scales 0.5,1")[0] == 0
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert 0 <= found["miou"] <= 1 and len(found["confusion"]) == len(found["iou"]) == 5 and found["images"] == 2
    assert (tmp_path / "scores" / "confusion.png").exists()
    code, out, _ = command("evaluate", samples, "--model", run / "last.safetensors")
    assert code == 0 and json.loads(out)["images"] == 2
    assert command("predict", samples / "images" / "val", "--model", run, "--out", tmp_path / "masks")[0] == 0
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 6


def test_predict_says_with_its_exit_code_that_a_file_was_skipped(command, trained, tmp_path):
    data, run = trained
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"\xff\xd8 and no more")
    image = data / "images" / "val" / "000.png"
    code, _, err = command("predict", bad, image, "--model", run, "--out", tmp_path / "out")
    assert code == cli.SKIPPED and err.startswith(f"skipped: {bad}: ")
    assert (tmp_path / "out" / "classes" / "000.png").exists()


def wrong_value(data: Path) -> None:
    mask = data / "masks" / "train" / "000.png"
    Image.fromarray(np.full_like(np.array(Image.open(mask)), 99)).save(mask)


def truncated(data: Path) -> None:
    image = data / "images" / "train" / "000.png"
    image.write_bytes(image.read_bytes()[:400])


def other_size(data: Path) -> None:
    image = data / "images" / "train" / "000.png"
    Image.open(image).resize((10, 10)).save(image)


def of_mode(mode: str):
    def change(data: Path) -> None:
        image = data / "images" / "train" / "000.png"
        Image.new(mode, Image.open(image).size).save(image)

    return change


def no_images(data: Path) -> None:
    for file in (data / "images" / "train").iterdir():
        file.unlink()
    for file in (data / "masks" / "train").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: (data / "masks" / "train" / "000.png").unlink(), "expected a mask"),
        (lambda data: (data / "images" / "train" / "000.png").unlink(), "expected an image"),
        (other_size, "expected a mask of 10x10 pixels"),
        (wrong_value, "got 99 (in 3072 pixels)"),
        (truncated, "cannot be decoded"),
        (of_mode("RGBA"), "got mode RGBA"),
        (of_mode("I;16"), "got mode I;16"),
        (no_images, "got an empty one"),
    ],
    ids=["no-mask", "no-image", "size", "value", "truncated", "alpha", "16-bit", "empty"],
)
def test_bad_data_is_one_line_before_anything_is_written(command, tmp_path, spoil, message):
    data = samples(tmp_path / "samples", 2, 1)
    spoil(data)
    code, out, err = command("train", data, "--out", tmp_path / "run", SMALL)
    assert code == 1 and message in err and err.count("\n") == 1 and err.startswith("error: ") and not out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("train {data} --out {run}", "holds a run; --resume goes on with it, --overwrite replaces it"),
        (f"train {{data}} --out {{run}} --overwrite {SMALL} --workers -1", "workers: expected 0 or more, got -1"),
        ("train --out {new}", "data: expected the folder of a data set, got none"),
        ("train --resume --out {new}", "data: expected the folder of a data set, got none, and "),
        ("train {data} --resume --lr 7 --out {run}", "lr: expected 0.005, as the run in"),
        ("train {data} --out {new} --trunk resnet19", "trunk: expected the name of a timm model, got 'resnet19'"),
        ("train {data} --out {new} --weights {run}/log.csv", "expected a model file that"),
        ("evaluate {data} --model {run} --num-classes 7", "num_classes: expected 5, as"),
        ("evaluate {data} --model {run} --scales 1,big", "scales: expected numbers such as 0.75,1,1.25, got '1,big'"),
        ("evaluate {data} --model {new}", "expected a model file, there is none"),
        ("evaluate {data} --model {run} --workers -1", "workers: expected 0 or more, got -1"),
        ("evaluate {data} --model {data}", "expected a model file or a run's folder, got a folder without"),
        ("evaluate {data} --model {run} --split test", "images/test: expected a folder, there is none"),
        ("predict {new} --model {run} --out {new}", "nothing matches it"),
        ("predict {data}/images/val --model {run} --out {new} --outputs heat", "outputs: expected some of"),
        ("predict {data}/images/val --model {run} --out {new} --tile 8 --overlap 8", "overlap: expected"),
        ("sample-data {data}", "expected a folder that is empty or new"),
        ("tune --trunk resnet19", "trunk: expected the name of a timm model"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_overwritten(command, trained, tmp_path, words, message):
    data, run = trained
    before = {file: file.read_bytes() for file in data.parent.rglob("*") if file.is_file()}
    code, _, err = command(words.format(data=data, run=run, new=tmp_path / "new"))
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert before == {file: file.read_bytes() for file in data.parent.rglob("*") if file.is_file()}
    assert not (tmp_path / "new").exists()


def test_every_setting_is_an_option_with_a_meaning(command):
    code, out, _ = command("train --help")
    assert code == 0
    for name, (_, meaning) in option_types().items():
        assert meaning and (name == "data" or f"--{name.replace('_', '-')}" in out), name
    assert TrainSettings.from_json(TrainSettings(Path("x")).to_json()) == TrainSettings(Path("x"))


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """What is tuned here decides no other test."""
    monkeypatch.setenv("REFINENET_FAST_TABLES", str(tmp_path))
    table.reload()
    yield
    monkeypatch.undo()
    table.reload()


def test_doctor_and_tune(command, own_tables):
    code, out, _ = command("doctor")
    assert code == 0
    for expected in ("torch", "reference", "cuda", "cxx_compiler"):
        assert expected in out
    code, _, err = command("tune --trunk test_resnet --height 32 --width 32 --device cpu")
    assert code == 0 and ("written: " in err or "nothing to choose from" in err)


def test_importing_the_package_imports_nothing_of_this():
    code = "import sys, refinenet_fast; print([m for m in ('typer', 'torchvision', 'PIL', 'rich') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    from refinenet_fast import command

    monkeypatch.delitem(sys.modules, "refinenet_fast.cli")
    monkeypatch.delattr("refinenet_fast.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit):
        command.main()
    assert capsys.readouterr().err == "refinenet-fast needs typer: run `pip install 'refinenet_fast[train]'`\n"


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in two ranks, on the reference backend."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += ["-m", "refinenet_fast", *(part for word in words for part in str(word).split())]
    environment = os.environ | {"REFINENET_FAST_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    return subprocess.run(start, capture_output=True, text=True, timeout=240, env=environment)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_torchrun_runs_the_same_command(command, tmp_path):
    """With it, 20 steps of two ranks have the losses of one process with the whole batches."""
    data = samples(tmp_path / "samples", 3, 1)  # a batch of two, and one of one
    exact = f"{SMALL} --epochs 10 --log-every 1 --precision float64 --dropout 0 --freeze-bn --lr 0.005"
    with use_backend("reference"):
        assert command("train", data, "--out", tmp_path / "one", exact)[0] == 0
    done = torchrun("train", data, "--out", tmp_path / "two", exact)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("epoch 10: mIoU") == 1 and (tmp_path / "two" / "last.safetensors").exists()
    assert "backend reference, float64, 2 process(es)" in done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=0, abs=1e-8)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_under_torchrun_an_error_in_the_data_is_said_once(tmp_path):
    data = samples(tmp_path / "samples", 2, 1)
    wrong_value(data)
    done = torchrun("train", data, "--out", tmp_path / "run", SMALL)
    assert done.returncode != 0 and done.stderr.count("got 99 (in 3072 pixels)") == 1
    assert not (tmp_path / "run").exists()
