"""Training on several ranks: what one process with the whole batch computes, they compute."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from training_runs import assert_same_ends, log, losses, on_ranks, samples, scan_as_rank, settings, train_as_rank

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("data") / "samples")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


@pytest.mark.parametrize(
    "options, of_the_ranks",
    [
        ({"batch": 2, "epochs": 7}, {}),  # 5 images in batches of 2, 2, 1
        ({"batch": 4, "epochs": 10, "class_weights": "log"}, {"accumulate": 2, "checkpoint_blocks": True}),
        pytest.param({"batch": 4, "epochs": 10}, {"accumulate": 2, "compile": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "weighted-accumulate-checkpoint-blocks", "accumulate-compile"],
)
def test_two_ranks_are_one_process_with_the_whole_batch(data, tmp_path, options, of_the_ranks):
    """20 steps in float64, an odd image left for one rank in the last batch of each epoch; metrics are summed, too.

    With ``checkpoint_blocks``, the ranks compute their blocks again within the backward pass in which
    DistributedDataParallel sums the gradients; the one process keeps all.
    """
    wanted = settings(data, **options, dropout=0.0, freeze_bn=True, precision="float64")
    divided = dataclasses.replace(wanted, **of_the_ranks)
    alone = on_ranks(tmp_path, train_as_rank, (wanted, tmp_path / "one"), backend="reference")
    ranks = on_ranks(tmp_path, train_as_rank, *2 * [(divided, tmp_path / "two")], backend="reference")
    for found, processes in ((alone, 1), (ranks, 2)):
        assert any(f"backend reference, float64, {processes} process(es)" in line for line in found[0]["said"])
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) >= 20 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=0, abs=1e-8)
    scored = [[row["pixel_accuracy"] for row in log(tmp_path / n) if row["miou"]] for n in ("one", "two")]
    assert scored[0] == scored[1] and len(scored[0]) == wanted.epochs


def test_two_ranks_are_stopped_and_resumed_to_the_same_bits(data, tmp_path):
    """Each with its own dropout; live batch norm, which sees other images on each, and its moving average."""
    wanted = settings(data, epochs=3, ema=0.9, precision="float64")
    whole = on_ranks(tmp_path, train_as_rank, *2 * [(wanted, tmp_path / "whole")])
    on_ranks(tmp_path, train_as_rank, *2 * [(wanted, tmp_path / "run", False, 6)])
    resumed = on_ranks(tmp_path, train_as_rank, *2 * [(wanted, tmp_path / "run", True)])
    assert "resumed after step 3 of 9" in resumed[0]["said"]
    assert_same_ends(tmp_path / "run", tmp_path / "whole")
    for network in ("model", "average"):
        expected = whole[0][network]
        assert any(key.endswith("running_var") for key in expected)
        for found in (*whole, *resumed):
            assert [key for key, value in expected.items() if not torch.equal(value, found[network][key])] == []
    columns = ("step", "loss", "miou", "pixel_accuracy")
    assert [[row[c] for c in columns] for row in log(tmp_path / "run")] == [
        [row[c] for c in columns] for row in log(tmp_path / "whole")
    ]


DIFFERENCES = {
    "settings": r"lr: expected 0\.005 on every rank, got 1\.0 on rank 1",
    "images": r"train images: expected '5 \(\w+\)' on every rank, got '5 \(\w+\)' on rank 1",
    "classes": r"classes: expected \['ground', .*'bar'\] on every rank, got \['ground', .*'rod'\] on rank 1",
    "checkpoint": "step: expected 3 on every rank, got 0 on rank 1",
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_machines_that_see_different_things_are_told(data, tmp_path, what):
    """As without a shared disk: the second rank's folders are its own."""
    shutil.copytree(data, tmp_path / "data")
    own = tmp_path / "data"
    wanted = [settings(data, epochs=1), settings(own, epochs=1, workers=1, lr=1.0 if what == "settings" else 0.005)]
    out = [tmp_path / "run", tmp_path / "elsewhere"]
    if what == "images":
        for folder in ("images", "masks"):
            (own / folder / "train" / "001.png").rename(own / folder / "train" / "007.png")
    if what == "classes":
        (own / "classes.txt").write_text((own / "classes.txt").read_text().replace("bar", "rod"))
    resume = what == "checkpoint"
    if resume:
        assert on_ranks(tmp_path, train_as_rank, *zip(wanted, out))[0]["error"] is None
    found = on_ranks(tmp_path, train_as_rank, *((w, o, resume) for w, o in zip(wanted, out)))
    for rank, kind in zip(found, ("BadInput", "Told")):
        assert re.fullmatch(f"{kind}: {DIFFERENCES[what]}; all machines need .* a disk that they share", rank["error"])
    assert (tmp_path / "run").exists() == resume and not (tmp_path / "elsewhere").exists()


def test_each_rank_scans_its_share(data, tmp_path):
    """A rank that waits for another's scan would give up after some minutes."""
    (alone,) = on_ranks(tmp_path, scan_as_rank, (settings(data),))
    ranks = on_ranks(tmp_path, scan_as_rank, *2 * [(settings(data),)])
    assert [len(found["seen"]) for found in ranks] == [4, 3]  # of 5 and of 2 images
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == sorted(alone["seen"])
    for found in ranks:
        for name, (pixels, sizes) in alone["found"].items():
            assert torch.equal(found["found"][name][0], pixels) and found["found"][name][1] == sizes


def test_what_is_wrong_in_another_ranks_share_is_said_by_the_first(tmp_path):
    data = samples(tmp_path / "samples")
    bad = data / "images" / "train" / "001.png"
    bad.write_bytes(b"nothing")
    first, second = on_ranks(tmp_path, scan_as_rank, *2 * [(settings(data),)])
    assert str(bad) not in first["seen"] and str(bad) in second["seen"]
    for kind, found in (("Unreadable", first), ("Told", second)):
        assert found["error"].startswith(f"{kind}: {bad}: expected an image")
