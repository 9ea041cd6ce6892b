"""Training on several ranks: what one process with the whole batch computes, they compute."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from training_runs import log, losses, processes, samples, settings, train_quietly


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return samples(tmp_path_factory.mktemp("data") / "samples")


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpoint-blocks"])
def test_two_ranks_are_one_process_with_the_whole_batch(data, tmp_path, again):
    """20 steps in float64, an odd image left for one rank in the last batch of each epoch; metrics are summed, too.

    ``again``: the ranks compute their blocks again within the backward pass in which DistributedDataParallel sums the
    gradients; the one process keeps all.
    """
    options = {"epochs": 7, "batch": 2, "dropout": 0.0, "freeze_bn": True, "precision": "float64"}
    wanted = settings(data, **options)  # 5 images in batches of 2, 2, 1
    divided = dataclasses.replace(wanted, checkpoint_blocks=again)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "REFINENET_FAST_BACKEND": "reference"}
    alone = processes().Process(target=train_quietly, args=(wanted, tmp_path / "one", False, environment))
    ranks = []
    for rank in ("0", "1"):
        own = environment | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        ranks.append(processes().Process(target=train_quietly, args=(divided, tmp_path / "two", False, own)))
    for process in (alone, *ranks):
        process.start()
    for process in (alone, *ranks):
        process.join(240)
        assert process.exitcode == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 21 and one[0] != one[-1]
    assert two == pytest.approx(one, rel=0, abs=1e-8)
    scored = [[row["pixel_accuracy"] for row in log(tmp_path / n) if row["miou"]] for n in ("one", "two")]
    assert scored[0] == scored[1] and len(scored[0]) == 7
