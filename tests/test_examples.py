"""The examples run, with no network to be had."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

DEPTH = Path(__file__).resolve().parent.parent / "examples" / "depth.py"
if not DEPTH.is_file():
    pytest.skip("needs the checkout's examples/", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def depth() -> ModuleType:
    spec = importlib.util.spec_from_file_location("depth_example", DEPTH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_depth_without_a_network(tmp_path):
    photo, picture = tmp_path / "photo.png", tmp_path / "depth.png"
    Image.effect_noise((120, 90), 50).save(photo)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, DEPTH, photo, "--out", picture, "--side", "70"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=environment)
    assert "cannot be fetched" in done.stderr and "random weights instead, in Small's widths" in done.stderr
    assert "18 of 18 blocks accelerated" in done.stdout
    assert Image.open(picture).size == (120, 90)


def test_depth_behind_a_proxy_that_refuses(depth, monkeypatch, capsys):
    """The hub raises its HTTP client's error, which is no OSError."""
    refused = type("ProxyError", (depth.HfHubHTTPError.__bases__[0],), {})
    assert not issubclass(refused, OSError)

    def fetch(name: str) -> torch.nn.Module:
        raise refused("403 Forbidden")

    monkeypatch.setattr(depth.AutoModelForDepthEstimation, "from_pretrained", fetch)
    monkeypatch.setattr(depth, "DepthAnythingForDepthEstimation", lambda configuration: torch.nn.Identity())
    assert isinstance(depth.load("somebody/Depth-Anything-V2-Large-hf"), torch.nn.Identity)
    assert "(403 Forbidden): random weights instead, in Large's widths" in capsys.readouterr().err


@pytest.mark.parametrize(("widths", "parameters"), [("Small", 24.8e6), ("Base", 97.5e6), ("Large", 335.3e6)])
def test_depth_of_random_weights_has_the_size_that_is_named(depth, widths, parameters):
    """As the authors' table of models gives it."""
    with torch.device("meta"):
        model = depth.DepthAnythingForDepthEstimation(depth.configuration(widths))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-2)
    assert depth.named_widths(f"depth-anything/Depth-Anything-V2-Metric-Indoor-{widths}-hf") == widths
    assert depth.named_widths("somebody/else") == "Small"
