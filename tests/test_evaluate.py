"""Scores: against torchmetrics, at the masks' own size, with several scales, mirrored and tiled."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from PIL import Image

from refinenet_fast import RefineNet
from refinenet_fast.training.data import open_split
from refinenet_fast.training.evaluation import evaluate
from refinenet_fast.training.files import BadInput
from refinenet_fast.training.metrics import confusion, scores
from refinenet_fast.training.model_file import Description
from refinenet_fast.training.pictures import save_confusion
from refinenet_fast.training.prediction import Segmenter
from refinenet_fast.training.samples import CLASSES
from training_runs import samples

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """The networks are tiny."""


@pytest.fixture(scope="module")
def segment() -> Segmenter:
    torch.manual_seed(0)
    model = RefineNet(5, "test_resnet", width=8, deep_width=8, init="kaiming").eval()
    torch.nn.init.normal_(model.classifier.weight)
    return Segmenter(model, Description({}, list(CLASSES), MEAN, STD))


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(seed)
    classes = 3 + seed
    truth, predicted = (torch.randint(classes, (4, 9, 11), generator=generator) for _ in range(2))
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    matrix = confusion(predicted, truth, classes, 255)
    found = scores(matrix, [str(k) for k in range(classes)])

    def theirs(metric: str, **options) -> float:
        return getattr(classification, metric)(num_classes=classes, ignore_index=255, **options)(
            predicted, truth
        ).item()

    assert found["miou"] == pytest.approx(theirs("MulticlassJaccardIndex", average="macro"), rel=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(theirs("MulticlassAccuracy", average="micro"), rel=1e-6)
    assert found["mean_accuracy"] == pytest.approx(theirs("MulticlassAccuracy", average="macro"), rel=1e-6)
    expected = classification.MulticlassConfusionMatrix(num_classes=classes, ignore_index=255)(predicted, truth)
    assert torch.equal(matrix, expected)


def test_scores_where_classes_are_missing():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    found = scores(matrix, ["a", "b", "c"])
    assert found["iou"] == {"a": 0.75, "b": 0.0, "c": None} and found["miou"] == 0.375
    assert found["mean_accuracy"] == found["pixel_accuracy"] == 0.75
    empty = scores(torch.zeros(3, 3, dtype=torch.int64), ["a", "b", "c"])
    assert empty["miou"] is empty["pixel_accuracy"] is empty["mean_accuracy"] is None


def test_a_ranks_shares_add_up(segment, tmp_path):
    split = open_split(samples(tmp_path / "samples", 1, 3), "folder", "val")
    whole = evaluate(segment, split, 255)
    parts = [evaluate(segment, split, 255, rank=rank, world=2, workers=rank) for rank in range(2)]
    assert torch.equal(whole, sum(parts)) and whole.sum() == sum((split.read(k)[1] != 255).sum() for k in range(3))


def test_the_ignore_value_may_be_the_number_behind_the_classes(segment, tmp_path):
    split = open_split(samples(tmp_path / "samples", 1, 1), "folder", "val")
    mask = np.array(Image.open(split.masks[0]))
    mask[mask == 255] = 5
    Image.fromarray(mask).save(split.masks[0])
    assert evaluate(segment, replace(split, num_classes=5, ignore_value=5), 5).sum() == (mask != 5).sum()
    with pytest.raises(BadInput, match=r"000\.png: expected classes 0 to 4, or 255 where unlabelled, got 5"):
        evaluate(segment, replace(split, num_classes=5, ignore_value=255), 255)


def test_a_network_without_names_scores_any_data_set_of_as_many_classes(segment, tmp_path):
    split = open_split(samples(tmp_path / "samples", 1, 1), "folder", "val")
    numbered = replace(segment, description=replace(segment.description, class_names=list("01234")))
    expected = evaluate(segment, split, 255)
    assert torch.equal(evaluate(numbered, split, 255), expected)
    assert torch.equal(evaluate(segment, replace(split, class_names=None), 255), expected)


@pytest.mark.parametrize("scales, flip", [((0.5,), False), ((0.75, 1.5), False), ((1.0,), True), ((0.5, 1.0), True)])
def test_probabilities_are_averaged_over_scales_and_mirror_images(segment, scales, flip):
    from torchvision.transforms import v2

    from refinenet_fast.training.augment import normalise

    image = torch.randint(256, (3, 37, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    total = 0
    for scale in scales:
        size = [round(37 * scale), round(50 * scale)]
        resized = normalise(v2.functional.resize(image, size) if scale != 1 else image, MEAN, STD)[None]
        views = [(resized, False), (resized.flip(3), True)] if flip else [(resized, False)]
        for view, mirrored in views:
            with torch.no_grad():
                logits = segment.network(view)
            logits = logits.flip(3) if mirrored else logits
            total = total + torch.nn.functional.interpolate(logits, (37, 50), mode="bilinear").softmax(1)
    found = replace(segment, scales=scales, flip=flip)(image)
    assert found.shape == (37, 50) and found.dtype == torch.uint8
    assert (found == total.argmax(1)[0]).float().mean() > 0.999  # ties


def test_images_are_seen_at_the_scale_of_training(segment):
    image = torch.randint(256, (3, 37, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    trained = replace(segment, description=replace(segment.description, scale=0.5))
    assert torch.equal(trained(image), replace(segment, scales=(0.5,))(image))
    assert torch.equal(replace(trained, scales=(2.0,), flip=True)(image), replace(segment, flip=True)(image))
    assert not torch.equal(trained(image), segment(image))


def test_the_confusion_matrix_as_a_picture(tmp_path):
    for classes in (2, 30):
        matrix = torch.randint(9, (classes, classes))
        save_confusion(tmp_path / f"{classes}.png", matrix, [f"class {k}" for k in range(classes)])
        with Image.open(tmp_path / f"{classes}.png") as picture:
            assert min(picture.size) > 300


def test_rows_of_the_picture_are_true_classes_and_columns_predicted_ones(tmp_path, monkeypatch):
    """Ten pixels of a are taken for b, none of b for a: the square in a's row and b's column alone is dark."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def note(figure: Figure, *args: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    save_confusion(tmp_path / "x.png", torch.tensor([[0, 10], [0, 0]]), ["a", "b"])
    axes = figures[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["a", "b"]
    with Image.open(tmp_path / "x.png") as picture:
        brightness = np.array(picture.convert("L"))
    for row in range(2):
        for column in range(2):
            x, y = axes.transData.transform((column + 0.3, row + 0.3))  # beside the number
            dark = brightness[len(brightness) - 1 - int(y), int(x)] < 100
            assert dark == ((row, column) == (0, 1)), (row, column)


@pytest.mark.parametrize(
    "options",
    [
        {"scales": ()},
        {"scales": (0.0,)},
        {"scales": (math.nan,)},
        {"scales": (1.0, math.inf)},
        {"tile": 64, "overlap": 64},
        {"tile": -1},
    ],
)
def test_what_cannot_be(segment, options):
    with pytest.raises(BadInput, match=r"(scales|overlap): expected .*, got"):
        replace(segment, **options)
