"""The whole network: its size, its wiring, images of any size, training, and what people do with models."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refinenet_fast import ops, use_backend
from refinenet_fast.model import RefineNet
from refinenet_fast.testing import relative_l2
from refinenet_fast.trunks import create_trunk

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small(num_classes: int = 5, seed: int = 0, **options) -> RefineNet:
    """A narrow network whose decoder weights keep the signal's scale, so that every path shows in the result."""
    torch.manual_seed(seed)
    model = RefineNet(num_classes, trunk="resnet18", width=8, deep_width=16, **options)
    for module in [*model.blocks.modules(), model.classifier]:
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_uniform_(module.weight, a=5**0.5)
    return model


def photograph() -> Tensor:  # (1, 3, 375, 500)
    """A photograph where REFINENET_FAST_CAMVID names a folder of them, otherwise smooth noise; normalised."""
    folder = os.environ.get("REFINENET_FAST_CAMVID")
    if not folder:
        coarse = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
        return F.interpolate(coarse, (375, 500), mode="bicubic")
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    file = min(Path(folder, "images", "val").glob("*.jpg"))
    pixels = to_tensor(Image.open(file).convert("RGB").resize((500, 375)))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((pixels - mean[:, None, None]) / std[:, None, None])[None]


@pytest.fixture(scope="module")
def model() -> RefineNet:
    return small().eval()


@pytest.fixture(scope="module")
def refinenet101() -> RefineNet:
    return RefineNet(num_classes=21, trunk="resnet101", crp_stages=4).eval()


def test_parameters_of_refinenet101(refinenet101):
    assert sum(p.numel() for p in refinenet101.parameters()) == 118_052_437  # the released VOC network's: 118.05 M


def test_photograph(refinenet101):
    torch.set_num_threads(os.cpu_count() or 1)
    with torch.inference_mode():
        logits = refinenet101(photograph())
    assert logits.shape == (1, 21, 375, 500)
    assert logits.isfinite().all()
    assert logits.std((2, 3)).min() > 0, "the logits do not depend on the place"


@pytest.mark.slow
def test_winograds_error_on_a_trunks_maps():
    """Real maps are no standard normals: smooth, and where they come from a ReLU not negative."""
    torch.manual_seed(0)
    model = RefineNet(num_classes=21, trunk="resnet101", init="kaiming").eval()
    with torch.inference_mode():
        maps = model.trunk(photograph()[:, :, :256, :256])
        for x, block in zip(reversed(maps), model.blocks, strict=True):
            weight = block.adapt[0].weight
            with use_backend("auto"):
                y = ops.fuse([x], [weight])
            truth = F.conv2d(x.double(), weight.double(), padding=1)
            error, pytorch = relative_l2(y, truth), relative_l2(F.conv2d(x, weight, padding=1), truth)
            # Winograd in float32 is allowed 1e-5 (testing.WINOGRAD_ERROR); on maps like these it needs less.
            # Seen with AVX2: 0.4 to 0.9 of PyTorch's; with AVX-512, whose vendor is more exact, 2.3e-6 against 2.4e-7.
            assert error <= max(2.5e-6, 2 * pytorch) and error <= 1e-5, f"{x.shape[1]} channels"


@pytest.mark.slow
def test_refinenet101s_logits_against_float64():
    torch.manual_seed(0)
    model = RefineNet(num_classes=21, trunk="resnet101", crp_stages=4, init="kaiming").eval()
    torch.set_num_threads(os.cpu_count() or 1)
    image = photograph()[:, :, :128, :160]
    with torch.inference_mode():
        logits, folded = model(image), model.fold_batch_norm()(image)
        with use_backend("reference"):
            truth = model.double()(image.double())
    for got in (logits, folded):
        assert relative_l2(got, truth) <= 1e-5  # seen: 1e-6
        assert (got - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_decoder_initialisation(refinenet101):
    convs = [m for m in [*refinenet101.blocks.modules(), refinenet101.classifier] if isinstance(m, torch.nn.Conv2d)]
    # Adaptive 4, fusion 2 x 3, CRP 4 x 4, units 2 x 7 + 6 outputs with two convolutions each, and the classifier.
    assert len(convs) == 4 + 6 + 16 + 2 * (14 + 6) + 1
    for layer in convs:
        assert abs(layer.weight.std().item() - 0.01) < 2e-4
        assert layer.bias is None or not layer.bias.any()


def plain_decoder(model: RefineNet, maps: list[Tensor]) -> Tensor:
    """The decoder as the released networks' authors' ports write it: plain operations, stage by stage."""

    def rcus(x, units):
        for unit in units:
            x = x + unit.conv2(F.relu(unit.conv1(F.relu(x))))
        return x

    y = None
    for level, block in zip((3, 2, 1, 0), model.blocks, strict=True):
        x = rcus(block.adapt[0](maps[level]), block.units[0])
        if y is not None:
            below = block.fusion.convs[1](rcus(y, block.units[1]))
            x = block.fusion.convs[0](x)
            x = x + F.interpolate(below, x.shape[2:], mode="bilinear", align_corners=True)
        x = top = F.relu(x)
        for layer in block.pooling.convs:
            top = layer(F.max_pool2d(top, 5, stride=1, padding=2))
            x = x + top
        y = rcus(x, block.output)
    return model.classifier(y)


@pytest.mark.parametrize("size", [(64, 64), (33, 65), (97, 31)])
def test_logits_are_those_of_the_plain_network(size):
    model = small().double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        quarter = plain_decoder(model, model.trunk(images))
        expected = F.interpolate(quarter, size, mode="bilinear", align_corners=False)
        assert expected.std() > 1e-2
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
        model.upsample = False
        torch.testing.assert_close(model(images), quarter, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_plain_network():
    model = small(dropout=0.0).double().eval()
    images = torch.randn(1, 3, 45, 70, dtype=torch.float64)
    expected = F.interpolate(plain_decoder(model, model.trunk(images)), (45, 70), mode="bilinear")
    gy = torch.randn_like(expected)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters, gy)
    for g, e in zip(torch.autograd.grad(model(images), parameters, gy), wanted, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8 * (1 + e.abs().max().item()))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (33, 65), (97, 31), (2, 3)])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_any_image_size(model, size, batch):
    with torch.no_grad():
        logits = model(torch.randn(batch, 3, *size))
    assert logits.shape == (batch, 5, *size)
    assert logits.isfinite().all()


def test_upsampling_can_be_left_out():
    with torch.no_grad():
        assert small(upsample=False).eval()(torch.randn(1, 3, 33, 65)).shape == (1, 5, 9, 17)


def test_any_memory_layout_gives_the_same_bits(model):
    images = torch.randn(2, 3, 40, 56)
    before = images.clone()
    with torch.no_grad():
        expected = model(images)
        assert expected.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(images.mT.contiguous().mT), expected, rtol=0, atol=0)
    assert torch.equal(images, before)


def test_dropout_acts_in_training_on_the_two_deepest_maps_and_before_the_classifier():
    model, dropped = small(dropout=0.25).train(), []
    assert model.dropout.p == 0.25
    model.dropout.register_forward_hook(lambda module, args, y: dropped.append(tuple(y.shape[1:])))
    model(torch.randn(2, 3, 64, 64))
    assert dropped == [(256, 4, 4), (512, 2, 2), (8, 16, 16)]


def scenes(count: int, size: int) -> tuple[Tensor, Tensor]:  # (N, 3, H, W), (N, H, W) int64
    """Rectangles of five classes on noise; a class is a colour."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.randn(5, 3, generator=generator)
    target = torch.zeros(count, size, size, dtype=torch.long)
    for scene in target:
        for label in range(1, 5):
            top, left = torch.randint(size // 2, (2,), generator=generator).tolist()
            scene[top : top + size // 2, left : left + size // 2] = label
    images = colours[target].permute(0, 3, 1, 2) + 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return images, target


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_training_halves_the_loss(autocast):
    model, losses = small(dropout=0.1).train(), []
    images, target = scenes(2, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    while len(losses) < 30 and (not losses or losses[-1] > losses[0] / 2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= losses[0] / 2, losses


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_gradients_reach_every_parameter(autocast):
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(scenes(2, 64)[0])
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    logits.float().square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == p.dtype and p.grad.isfinite().all(), name
        assert name.startswith("trunks.") or p.grad.any(), name  # timm starts some trunk branches at zero


def test_bfloat16_is_close_to_float32(model):
    images = scenes(2, 64)[0]
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
        whole = copy.deepcopy(model).bfloat16()(images.bfloat16())
    for logits in (mixed, whole):
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).norm() < 0.02 * expected.norm()  # seen: 0.006


def test_compiles_without_graph_breaks():
    model, images = small(dropout=0.0).eval(), scenes(1, 48)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # Inductor compiles a block in test_blocks.py
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(f(images).square().sum(), parameters) for f in (model, compiled)]
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    for expected, g in zip(*grads, strict=True):
        assert (g - expected).norm() <= 1e-3 * expected.norm() + 1e-6


def test_copies_give_the_same_bits(model):
    images = torch.randn(1, 3, 33, 65)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    loaded = small(seed=1).eval()
    with torch.no_grad():
        expected = model(images)
        assert not torch.equal(loaded(images), expected)
        loaded.load_state_dict(torch.load(stored, weights_only=True))
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)


@pytest.mark.parametrize(
    "images, error, said",
    [
        ([[1.0]], TypeError, "images: expected a Tensor, got list"),
        (torch.zeros(3, 8, 8), ValueError, r"images: expected shape \(N, 3, H, W\) with H, W >= 1, got \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"images: expected shape \(N, 3, H, W\).*got \(1, 4, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"images: expected shape \(N, 3, H, W\).*got \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "images: expected torch.float32.*got torch.uint8"),
        (torch.zeros(1, 3, 8, 8).double(), TypeError, "images: expected torch.float32.*got torch.float64"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "images: expected device cpu.*got meta"),
    ],
)
def test_bad_images(model, images, error, said):
    with pytest.raises(error, match=said):
        model(images)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"num_classes": "5"}, TypeError, "num_classes: expected an integer, got '5'"),
        ({"width": 0}, ValueError, "width: expected an integer >= 1, got 0"),
        ({"deep_width": 1.5}, TypeError, "deep_width: expected an integer, got 1.5"),
        ({"crp_stages": 0}, ValueError, "crp_stages: expected an integer >= 1, got 0"),
        ({"dropout": 1.5}, ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
        ({"trunk": 18}, TypeError, "trunk: expected the name of a timm model, got 18"),
        ({"trunk": "resnet102"}, ValueError, "trunk: .*got 'resnet102'; similar names: .*resnet10"),
        ({"trunk": "levit_128"}, ValueError, "trunk: expected one with maps at .*1/32, NCHW, got 'levit_128'"),
        ({"trunk": "vit_tiny_patch16_224"}, ValueError, r"trunk: .*got 'vit_tiny_patch16_224' \(1/16, 1/16"),
        ({"trunk": "swin_tiny_patch4_window7_224"}, ValueError, r"trunk: .*NCHW, got 'swin.*1/32, NHWC\)"),
    ],
)
def test_bad_construction(options, error, said):
    with pytest.raises(error, match=said):
        RefineNet(**{"num_classes": 5, "trunk": "resnet18", **options})


@pytest.mark.parametrize("name", ["resnet34", "mobilenetv2_100", "convnext_atto"])
def test_trunks(name):
    trunk, channels = create_trunk(name)
    with torch.no_grad():
        maps = trunk.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, c, 64 // r, 96 // r) for c, r in zip(channels, (4, 8, 16, 32))]


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"pretrained: .*'resnet18'.*no route to host.*pass pretrained=False"):
        create_trunk("resnet18", pretrained=True)
    with pytest.raises(ValueError, match="trunk: expected one with maps"):
        create_trunk("levit_128", pretrained=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="RefineNet's trunks come from timm: run `pip install timm`"):
        create_trunk("resnet18")
