"""Training runs that are killed, stopped, or out of room, and go on: to the same bits as one that nothing stopped."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from PIL import Image
from safetensors.torch import load_file

from refinenet_fast import files
from refinenet_fast.training import checkpoint
from refinenet_fast.training.files import BadInput, write_json
from refinenet_fast.training.loop import train
from refinenet_fast.training.run_folder import RunFolder
from refinenet_fast.training.settings import TrainSettings
from training_runs import (
    assert_same_ends,
    processes,
    samples,
    settings,
    train_quietly,
    train_until_killed,
    train_with_little_room,
)

KILLS = int(os.environ.get("REFINENET_FAST_KILLS", "20"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("data") / "samples")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> tuple[TrainSettings, Path]:
    """A run that nothing stops; dropout, live batch norm and a moving average are on."""
    wanted = settings(data, epochs=3, save_every=1, ema=0.9)
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = processes().Process(target=train_quietly, args=(wanted, out))
    process.start()
    process.join()
    assert process.exitcode == 0
    return wanted, out


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_moment_it_resumes_to_the_same_bits(uninterrupted, tmp_path, number):
    """20 moments, or as many as REFINENET_FAST_KILLS says: in a step, a score, a checkpoint, before the first one."""
    wanted, whole = uninterrupted
    after, share = (0, 2, 3, 4, 5, 6, 7)[number % 7], random.random()  # of 9 steps
    process = processes().Process(target=train_until_killed, args=(wanted, tmp_path / "run", after, share))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert left or after == 0
    for file in left:
        assert torch.load(file, weights_only=True)["step"] > 0
    train(wanted, tmp_path / "run", resume=True)
    assert not list(tmp_path.rglob("*.partial"))
    assert_same_ends(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "saves, options",
    [
        (0, {}),
        (2, {}),
        (2, {"precision": "float16", "optimizer": "adamw", "lr": 1e-3, "ema": 0.5}),
        (2, {"workers": 1, "colour": 0.3, "accumulate": 2, "precision": "bfloat16"}),
    ],
    ids=["before-the-first", "later", "float16", "workers-bfloat16"],
)
def test_stopped_before_it_saves_it_resumes_from_the_save_before(data, tmp_path, monkeypatch, saves, options):
    """In one process, by an error: faster than a kill, and always at the same place."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, growth_interval=1))
    wanted = settings(data, epochs=3, save_every=2, **options)
    train(wanted, tmp_path / "whole")
    saved, done = checkpoint.save, []

    def save_or_stop(folder: Path, step: int, state: dict) -> Path:
        if len(done) == saves:
            raise KeyboardInterrupt
        done.append(state["scaler"].get("scale"))
        return saved(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", save_or_stop)
    with pytest.raises(KeyboardInterrupt):
        train(wanted, tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save", saved)
    said: list[str] = []
    train(wanted, tmp_path / "run", resume=True, say=said.append)
    assert ("resumed after step 3 of 9" in said) == (saves == 2)
    assert wanted.precision != "float16" or done[-1] != torch.amp.GradScaler("cpu").get_scale()  # not the first one
    assert_same_ends(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    wanted = settings(data)
    train(wanted, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "last.safetensors")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    train(wanted, tmp_path / "run", resume=True, say=said.append)
    assert any("step-00000006.pt: expected a checkpoint" in line for line in said)
    assert "resumed after step 3 of 6" in said
    assert all(torch.equal(v, kept[k]) for k, v in load_file(tmp_path / "run" / "last.safetensors").items())
    for file in newest.parent.iterdir():
        file.write_bytes(b"")
    with pytest.raises(BadInput, match=r"step-00000003\.pt: expected a checkpoint"):
        train(wanted, tmp_path / "run", resume=True)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"step": 1, "model": Attack()}, tmp_path / "step-00000001.pt")
    with pytest.raises(BadInput):
        checkpoint.load_newest(tmp_path, print)
    assert not (tmp_path / "attacked").exists()


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_loads(data, tmp_path, monkeypatch):
    import errno

    wanted, saves = settings(data), []
    synced = os.fsync

    def full_after_a_while(descriptor: int) -> None:
        saves.append(descriptor)
        if len(saves) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_a_while)
    with pytest.raises(BadInput, match="cannot be written: the disk is full"):
        train(wanted, tmp_path / "run")
    monkeypatch.setattr(os, "fsync", synced)
    assert checkpoint.load_newest(tmp_path / "run" / "checkpoints", print)["step"] == 3
    assert not list(tmp_path.rglob("*.partial"))
    train(wanted, tmp_path / "run", resume=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 10 MB (a checkpoint has 3.5), and what gives it more; where none may be mounted, a
    folder and None."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0

    mounted = mount("size=10m")
    yield folder, (lambda: mount("remount,size=64m")) if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs, or a limit on the size of files")
def test_a_disk_that_is_really_full(data, small_disk, tmp_path):
    """The run says so in one line, the last good checkpoint loads, and with room again it ends at the same bits.

    Where nothing may be mounted: files that may not become as large as a checkpoint, from the third one on.
    """
    folder, grow = small_disk
    wanted = settings(data, epochs=3, save_every=1)
    arguments = (wanted, folder / "run", None if grow else 1 << 20, tmp_path / "said")
    process = processes().Process(target=train_with_little_room, args=arguments)
    process.start()
    process.join()
    said = (tmp_path / "said").read_text()
    assert ("cannot be written: the disk is full" if grow else "cannot be written: File too large") in said
    assert process.exitcode == 0 and "\n" not in said and not list(folder.rglob("*.partial"))
    assert checkpoint.load_newest(folder / "run" / "checkpoints", print)["step"] == 2
    assert grow is None or grow()
    train(wanted, folder / "run", resume=True)
    train(wanted, tmp_path / "whole")
    assert_same_ends(folder / "run", tmp_path / "whole")


def test_a_run_on_other_data_is_not_resumed(tmp_path):
    """The classes are those of the masks: they have become more, with the settings as they were."""
    data = samples(tmp_path / "samples")
    (data / "classes.txt").unlink()
    wanted = settings(data, epochs=1)
    train(wanted, tmp_path / "run")
    before = contents(tmp_path / "run")
    mask = data / "masks" / "train" / "001.png"
    kept = mask.read_bytes()
    Image.fromarray(np.minimum(np.array(Image.open(mask)), 7)).save(mask)
    with pytest.raises(BadInput, match="expected the classes that the run has begun with, got 5 for none"):
        train(wanted, tmp_path / "run", resume=True)
    mask.write_bytes(kept)
    for folder in ("images", "masks"):
        (data / folder / "train" / "001.png").rename(data / folder / "train" / "007.png")
    with pytest.raises(BadInput, match=r"expected the images .* begun with, got 002\.png for 001\.png"):
        train(wanted, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_network_is_named(data, tmp_path):
    wanted = settings(data, epochs=1, ema=0.5)
    train(wanted, tmp_path / "run")
    train(dataclasses.replace(wanted, width=16), tmp_path / "wide")
    train(dataclasses.replace(wanted, ema=0.0), tmp_path / "plain")
    for other, message in (
        ("wide", r"keys that differ: .*weight is \(.*, expected \("),
        ("plain", r"missing module\."),
    ):
        shutil.copytree(tmp_path / other / "checkpoints", tmp_path / "run" / "checkpoints", dirs_exist_ok=True)
        with pytest.raises(
            BadInput, match=rf"step-00000003\.pt: expected the weights of this network, .*{message}"
        ) as e:
            train(wanted, tmp_path / "run", resume=True)
        assert "\n" not in str(e.value)


def test_a_run_without_its_settings_is_not_resumed(data, tmp_path):
    """With other ones, it would not be the same run."""
    train(settings(data, epochs=1), tmp_path / "run")
    (tmp_path / "run" / "settings.json").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(BadInput, match=r"settings\.json: expected the settings of the run that is resumed"):
        train(settings(data, epochs=1, lr=1.0), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}], ids=["resume", "overwrite", "new"])
def test_only_a_runs_own_half_written_files_are_removed(tmp_path, options):
    """What else ends in .partial is a download, or a prediction that runs right now."""

    def half_written(path: Path) -> Path:
        with files.whole(path):
            (partial,) = path.parent.glob(f"{path.name}.*")
        partial.touch()
        return partial

    folder = RunFolder(tmp_path / "run")
    if options:
        write_json(folder.settings, settings(tmp_path).to_json())
    written = (folder.settings, folder.log, folder.best, folder.last)
    own = [half_written(path) for path in written]
    own += [half_written(folder.checkpoints / "step-00000003.pt"), half_written(folder.previews / "epoch-0001.png")]
    others = [half_written(folder.path / "masks" / "classes" / "a.png"), half_written(folder.path / "a.png")]
    for name in ("film.mkv.partial", "settings.json.partial", "masks/clip.17.partial/000001.png"):
        others.append(folder.path / name)
        others[-1].parent.mkdir(parents=True, exist_ok=True)
        others[-1].touch()
    folder.claim(settings(tmp_path), **{"resume": False, "overwrite": False, **options})
    assert not [path for path in own if path.exists()]
    assert [path for path in others if path.exists()] == others


def test_every_random_state_comes_back():
    def draw() -> tuple:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()

    np.random.randn()  # leaves the second of a pair behind
    state = checkpoint.random_state()
    first = draw()
    checkpoint.set_random_state(state)
    assert draw() == first
