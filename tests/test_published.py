"""Published state dicts: loaded exactly, held against the networks written out from them, or refused by name."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refinenet_fast import RefineNet

pytest.importorskip("timm")
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}

# -- the layouts, from the table in their authors' repositories --------------------------------------------------------


def trunk_shapes(trunk: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    expansion, c = 1 if trunk == "resnet18" else 4, 64
    for stage, count in enumerate(BLOCKS[trunk], start=1):
        width = 32 * 2**stage
        for block in range(count):
            at = f"layer{stage}.{block}"
            convs = [(width, c, 3), (width, width, 3)]
            if expansion == 4:
                convs = [(width, c, 1), (width, width, 3), (4 * width, width, 1)]
            for k, (out, into, size) in enumerate(convs, start=1):
                shapes |= {f"{at}.conv{k}.weight": (out, into, size, size), **norm(f"{at}.bn{k}", out)}
            if block == 0 and (stage > 1 or expansion == 4):
                out = width * expansion
                shapes |= {f"{at}.downsample.0.weight": (out, c, 1, 1), **norm(f"{at}.downsample.1", out)}
            c = width * expansion
    return shapes


def norm(at: str, c: int) -> dict[str, tuple[int, ...]]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{at}.{name}": (c,) for name in names}, f"{at}.num_batches_tracked": ()}


def layout(
    trunk: str, light: bool, classes: int = 7, width: int = 16, deep: int = 24, bias: str = "first"
) -> dict[str, tuple[int, ...]]:
    shapes, expansion, r = trunk_shapes(trunk), 1 if trunk == "resnet18" else 4, 1 if light else 3
    for n in (1, 2, 3, 4):
        w = deep if n == 1 else width
        shapes[f"p_ims1d2_outl{n}_dimred.weight"] = (w, 64 * expansion * 2 ** (4 - n), r, r)
        groups = [] if light else [(f"adapt_stage{n}_b", 2), (f"mflow_conv_g{n}_b", 3)]
        for group, count in groups:
            for k in range(1, count + 1):
                for suffix, has_bias in (("", bias != "none"), ("_relu_varout_dimred", bias == "both")):
                    shapes[f"{group}.0.{k}_conv{suffix}.weight"] = (w, w, 3, 3)
                    if has_bias:
                        shapes[f"{group}.0.{k}_conv{suffix}.bias"] = (w,)
        for k in (1, 2, 3, 4):
            shapes[f"mflow_conv_g{n}_pool.0.{k}_outvar_dimred.weight"] = (w, w, r, r)
        if n > 1:
            shapes[f"adapt_stage{n}_b2_joint_varout_dimred.weight"] = (w, w, r, r)
        if n < 4:
            shapes[f"mflow_conv_g{n}_b3_joint_varout_dimred.weight"] = (width, w, r, r)
    return {**shapes, "clf_conv.weight": (classes, width, 3, 3), "clf_conv.bias": (classes,)}


def randomised(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights that keep the signal's scale, and batch norm that does something."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(7)
            continue
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 4:
            value *= (shape[1] * shape[2] * shape[3]) ** -0.5
        elif key.endswith(("running_var", "weight")):
            value = 1 + 0.1 * value.abs()
        else:
            value *= 0.1
        weights[key] = value.to(dtype)
    return weights


# -- the networks, written out -----------------------------------------------------------------------------------------


class Written:
    """The published network on images, from its state dict alone."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights

    def conv(self, at: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{at}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{at}.bias"), stride, weight.shape[2] // 2)

    def norm(self, at: str, x: Tensor) -> Tensor:
        mean, var, gain, bias = (self.w[f"{at}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, gain, bias)

    def trunk(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.norm("bn1", self.conv("conv1", x, 2))), 3, 2, 1)
        maps = []
        for stage in (1, 2, 3, 4):
            block = 0
            while f"layer{stage}.{block}.conv1.weight" in self.w:
                x = self.residual(f"layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
                block += 1
            maps.append(x)
        return maps

    def residual(self, at: str, x: Tensor, stride: int) -> Tensor:
        bottleneck = f"{at}.conv3.weight" in self.w
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        y = x
        for k, s in enumerate(strides, start=1):
            y = self.norm(f"{at}.bn{k}", self.conv(f"{at}.conv{k}", y, s))
            y = F.relu(y) if k < len(strides) else y
        if f"{at}.downsample.0.weight" in self.w:
            x = self.norm(f"{at}.downsample.1", self.conv(f"{at}.downsample.0", x, stride))
        return F.relu(x + y)

    def units(self, at: str, x: Tensor) -> Tensor:
        k = 1
        while f"{at}.0.{k}_conv.weight" in self.w:
            h = F.relu(self.conv(f"{at}.0.{k}_conv", F.relu(x)))
            x = x + self.conv(f"{at}.0.{k}_conv_relu_varout_dimred", h)
            k += 1
        return x

    def __call__(self, images: Tensor) -> Tensor:
        maps, y = self.trunk(images), None
        for n in (1, 2, 3, 4):
            x = self.units(f"adapt_stage{n}_b", self.conv(f"p_ims1d2_outl{n}_dimred", maps[4 - n]))
            if y is not None:
                x = self.conv(f"adapt_stage{n}_b2_joint_varout_dimred", x)
                x = x + F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)
            x = top = F.relu(x)
            for k in (1, 2, 3, 4):
                top = self.conv(f"mflow_conv_g{n}_pool.0.{k}_outvar_dimred", F.max_pool2d(top, 5, 1, 2))
                x = x + top
            y = self.units(f"mflow_conv_g{n}_b", x)
            if n < 4:
                y = self.conv(f"mflow_conv_g{n}_b3_joint_varout_dimred", y)
        return self.conv("clf_conv", y)


@pytest.mark.parametrize("light", [False, True], ids=["full", "light-weight"])
@pytest.mark.parametrize("trunk, bias", [("resnet18", "both"), ("resnet50", "first"), ("resnet18", "none")])
@pytest.mark.parametrize("size", [(97, 131), (33, 65)])
def test_logits_are_those_of_the_published_network(trunk, bias, light, size):
    weights = randomised(layout(trunk, light, bias=bias))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = {} if light or bias == "first" else {"conv_bias": bias}
    model = RefineNet.from_state_dict(weights, upsample=False, **others)
    with torch.no_grad():
        expected = Written(weights)(images)
        assert expected.std() > 1e-2
        torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    assert not model.training and model.freeze_bn and not model.blocks.training


def test_the_released_sizes():
    weights = {key: torch.zeros(shape) for key, shape in layout("resnet50", False, 21, 256, 512).items()}
    model = RefineNet.from_state_dict(weights)
    assert sum(p.numel() for p in model.parameters()) == 99_060_309
    assert [len(block.pooling.convs) for block in model.blocks] == [4] * 4
    assert model.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("light", [False, True], ids=["full", "light-weight"])
@pytest.mark.parametrize("wrapper", [None, "segmenter", "model", "weights", "state_dict"])
def test_there_and_back(light, wrapper):
    weights = randomised(layout("resnet18", light), torch.float32)
    given = {f"module.{key}": value for key, value in weights.items()} if wrapper else weights
    model = RefineNet.from_state_dict({wrapper: given, "epoch": 3} if wrapper else given)
    back = model.to_published_state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("as_text", [True, False])
def test_files(tmp_path, name, as_text):
    from safetensors.torch import save_file

    weights, path = randomised(layout("resnet18", True), torch.float32), tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save({"segmenter": weights}, path)
    model = RefineNet.from_state_dict(str(path) if as_text else path)
    assert torch.equal(model.classifier.weight, weights["clf_conv.weight"])


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"segmenter": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        RefineNet.from_state_dict(tmp_path / "evil.pth")


@pytest.mark.parametrize("light", [False, True], ids=["full", "light-weight"])
def test_every_key_counts(light):
    """Decoder keys of each kind and some of the trunk's, missing, misshapen or renamed: refused, and by name."""
    shapes = layout("resnet18", light)
    weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
    decoder = [key for key in shapes if not key.startswith(("layer", "bn1"))]
    for key in (
        *decoder[::4],
        *decoder[-2:],
        "bn1.running_var",
        "layer3.1.conv2.weight",
        "layer4.0.downsample.1.num_batches_tracked",
    ):
        less = {k: v for k, v in weights.items() if k != key}
        with pytest.raises(ValueError, match=re.escape(f"missing: {key}")):
            RefineNet.from_state_dict(less)
        with pytest.raises(ValueError) as error:
            RefineNet.from_state_dict({**less, f"{key}_": weights[key]})
        assert f"unknown: {key}_" in str(error.value) and f"missing: {key};" in str(error.value)
        assert "2 keys" in str(error.value)
        with pytest.raises(ValueError, match=re.escape(f"of another shape: {key} ")):
            RefineNet.from_state_dict({**weights, key: torch.zeros(*shapes[key], 2)})


def test_all_that_differ_are_named():
    weights = {key: torch.zeros(shape) for key, shape in layout("resnet18", False).items()}
    gone = [weights.pop(key) is not None and key for key in ("conv1.weight", "mflow_conv_g2_b.0.3_conv.bias")]
    weights |= {"fc.weight": torch.zeros(1000, 512), "clf_conv.bias": torch.zeros(7, 1)}
    with pytest.raises(ValueError) as error:
        RefineNet.from_state_dict(weights)
    for said in (*gone, "unknown: fc.weight", "of another shape: clf_conv.bias (7, 1), expected (7,)", "4 keys"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    "source, error, said",
    [
        ({}, ValueError, "got an empty one"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, ValueError, "got keys such as 'a', 'b'"),
        ({"layer4.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, ValueError, "a ResNet classifier"),
        ({"layer4.0.conv1.weight": torch.zeros(1)}, ValueError, "a ResNet without a decoder"),
        (
            {"blocks.0.adapt.0.weight": torch.zeros(1), "classifier.weight": torch.zeros(1)},
            ValueError,
            "RefineNet itself",
        ),
        ({"p_ims1d2_outl1_dimred.weight": torch.zeros(1, 1, 1, 1)}, ValueError, "resnet18, .*got no residual blocks"),
        ({"p_ims1d2_outl1_dimred.weight": 3}, TypeError, "expected tensors, got int for key 'p_ims1d2"),
        ({"clf_conv.bias": torch.zeros(3, dtype=torch.int8)}, TypeError, "expected floating tensors .*got torch.int8"),
        ({"a": torch.zeros(3), "module.a": torch.zeros(3)}, ValueError, "each key once, got 'a' with the prefix"),
        ([1], TypeError, "expected a state dict or the path of one, got list"),
    ],
)
def test_something_else(source, error, said):
    with pytest.raises(error, match=said):
        RefineNet.from_state_dict(source)


def without(weights: dict, pattern: str) -> tuple[dict, list[str]]:
    gone = [key for key in weights if re.search(pattern, key)]
    assert gone
    return {key: value for key, value in weights.items() if key not in gone}, gone


@pytest.mark.parametrize(
    "light, pattern",
    [
        (True, r"_pool\.0\.4_"),
        (False, r"_b\.0\.\d_conv\.bias"),
        (False, r"_b\.0\."),
        (False, r"layer3\.1\."),
        (True, r"downsample"),
    ],
)
def test_a_part_that_is_missing_is_named_key_by_key(light, pattern):
    weights = {key: torch.zeros(shape) for key, shape in layout("resnet18", light).items()}
    less, gone = without(weights, pattern)
    with pytest.raises(ValueError, match=f"{len(gone)} keys") as error:
        RefineNet.from_state_dict(less)
    assert all(f"missing: {key}" in str(error.value) for key in gone)


@pytest.mark.parametrize(
    "light, key",
    [
        (False, "adapt_stage1_b.0.1_conv_relu_varout_dimred.bias"),
        (True, "adapt_stage1_b.0.1_conv.weight"),
        (False, "mflow_conv_g2_pool.0.5_outvar_dimred.weight"),
        (False, "layer3.2.conv1.weight"),
    ],
)
def test_a_key_too_many_is_the_only_one_that_is_named(light, key):
    weights = {k: torch.zeros(shape) for k, shape in layout("resnet18", light).items()}
    with pytest.raises(ValueError, match=re.escape(f"1 keys that differ: unknown: {key}") + "$"):
        RefineNet.from_state_dict({**weights, key: torch.zeros(3)})


def test_other_stages_and_biases_are_overrides():
    weights = randomised(layout("resnet18", False, bias="none"), torch.float32)
    less, _ = without(weights, r"_pool\.0\.4_")
    model = RefineNet.from_state_dict(less, crp_stages=3, conv_bias="none")
    assert model.to_published_state_dict().keys() == less.keys()


def test_overrides():
    weights = randomised(layout("resnet18", True), torch.float32)
    model = RefineNet.from_state_dict(weights, upsample=False, dropout=0.1, freeze_bn=False, scales=[1.0])
    assert (model.upsample, model.dropout.p, model.freeze_bn) == (None, 0.1, False)
    assert RefineNet.from_state_dict(weights, num_classes=7, trunk="resnet18").classifier.out_channels == 7
    with pytest.raises(ValueError, match="num_classes: expected 7, as in the state dict, got 21"):
        RefineNet.from_state_dict(weights, num_classes=21)
    with pytest.raises(ValueError, match="pretrained: expected False, as in the state dict, got True"):
        RefineNet.from_state_dict(weights, pretrained=True)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"cascades": 2}, "2 cascades"),
        ({"scales": (1.2, 0.6)}, "scales"),
        ({"scales": (0.5,)}, r"scales \(0.5,\)"),
        ({"trunk": "mobilenetv2_100"}, "trunk 'mobilenetv2_100'"),
        ({"trunk": "resnet26"}, "trunk 'resnet26'"),
    ],
)
def test_variants_without_a_published_layout(options, said):
    model = RefineNet(3, **{"trunk": "resnet18", "width": 8, "deep_width": 8, **options})
    with pytest.raises(ValueError, match=f"model: expected one that has a published layout.*{said}"):
        model.to_published_state_dict()
