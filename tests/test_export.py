"""Exported networks: what ONNX Runtime and a reloaded program make of them, at other sizes than the traced one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

from refinenet_fast import RefineNet, export
from refinenet_fast.exporting import FORMATS
from refinenet_fast.testing import relative_l2

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SIZES = [(1, 3, 64, 96), (3, 3, 33, 47), (2, 3, 130, 35)]  # the traced one is (2, 3, 70, 102)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


def network(**options) -> RefineNet:
    torch.manual_seed(0)
    return RefineNet(5, "test_resnet", **{"width": 8, "deep_width": 8, "init": "kaiming", **options}).eval()


def by_onnxruntime(path: Path, images: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(result)


def by_reloading(path: Path, images: Tensor) -> Tensor:
    return torch.export.load(path).module()(images)


RUN = {"onnx": by_onnxruntime, "torch": by_reloading}


@torch.no_grad()
def assert_means_the_same(path: Path, format: str, model: RefineNet, normalised: bool) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for size in SIZES:
        images = torch.rand(size, generator=torch.Generator().manual_seed(1))
        want = model((images - mean) / std if normalised else images)
        got = RUN[format](path, images)
        assert got.shape == want.shape and relative_l2(got, want) < 1e-4, size


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"light_weight": True, "upsample": False}, {"cascades": 1, "crp_order": "conv-pool", "upsample": "bicubic"}],
    ids=["default", "light-weight", "single"],
)
def test_any_batch_and_size(tmp_path, format, options):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model, normalised = network(**options), not options
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    given = {"mean": MEAN, "std": STD, "metadata": {"class_names": ["a", "b"]}} if normalised else {}
    path = export(model.train(), tmp_path / "deep" / "network", format, **given)
    assert model.training and all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert_means_the_same(path, format, model.eval(), normalised)
    if normalised:
        assert_made_of_known_operations(path, format)


def assert_made_of_known_operations(path: Path, format: str) -> None:
    """Nothing of this package; sizes and what was to be kept are in the file."""
    if format == "torch":
        found = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=found)
        assert json.loads(found["metadata.json"]) == {"class_names": ["a", "b"]}
        assert not [node for node in program.graph.nodes if "refinenet_fast" in str(node.target)]
        return
    import onnx

    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"} and not graph.functions
    (images,), (logits,) = graph.graph.input, graph.graph.output
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (images, logits)]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 5, "height", "width"]]
    assert json.loads({p.key: p.value for p in graph.metadata_props}["class_names"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "pt"}, ValueError, "format: expected one of 'onnx', 'torch', got 'pt'"),
        ({"mean": MEAN}, ValueError, "mean, std: expected both or neither"),
        ({"mean": MEAN, "std": (1.0,)}, ValueError, r"std: expected three values, got \(1.0,\)"),
        ({"model": torch.nn.ReLU()}, TypeError, "model: expected a RefineNet, got ReLU"),
    ],
)
def test_what_is_refused(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export(**{"model": network(), "path": tmp_path / "network", **arguments})
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'refinenet_fast\[export\]'"):
        export(network(), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trained_run_predicts_the_same(tmp_path):
    """The command: images from 0 to 1 in, logits whose largest is the class that `predict` writes."""
    pytest.importorskip("torchvision")
    from refinenet_fast import cli
    from refinenet_fast.training.files import read_image
    from refinenet_fast.training.loop import train
    from refinenet_fast.training.model_file import load_model
    from refinenet_fast.training.prediction import Segmenter
    from training_runs import samples, settings

    data = samples(tmp_path / "samples", 3, 1)
    train(settings(data, epochs=1), tmp_path / "run")
    cli.export(tmp_path / "run", tmp_path / "network", "torch")
    with pytest.raises(cli.BadInput, match="there already; --overwrite replaces it"):
        cli.export(tmp_path / "run", tmp_path / "network", "torch")
    image = read_image(data / "images" / "val" / "000.png")
    with torch.no_grad():
        logits = by_reloading(tmp_path / "network", image[None] / 255)
    classes = Segmenter(*load_model(tmp_path / "run"))(image)
    assert (logits[0].argmax(0) == classes).float().mean() > 0.999
