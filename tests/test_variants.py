"""Every member of the family: wiring, switches, gradients of the whole network, and what contradicts itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinenet_fast import RefineNet
from refinenet_fast.blocks import Convolution, ResidualConvUnit
from refinenet_fast.variants import PRESETS

pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = {
    "4-cascaded": {},
    "single": {"cascades": 1},
    "2-cascaded": {"cascades": 2},
    "2-scale": {"scales": (1.2, 0.6)},
    "2-scale, one trunk": {"scales": (1.2, 0.6), "share_trunk": True},
    "light-weight": {"light_weight": True, "crp_stages": 4},
    "light-weight single": {"light_weight": True, "cascades": 1},
    "light-weight 2-scale": {"light_weight": True, "scales": (1.2, 0.6)},
    "MobileNet-v2": {"trunk": "mobilenetv2_100", "light_weight": True},
    "ResNet-34": {"trunk": "resnet34"},
    "ResNet-50, Caffe": {"trunk": "resnet50", "trunk_stride": "1x1", "crp_order": "conv-pool"},
    "skip relu, both biases": {"rcu_skip": "relu", "conv_bias": "both", "head": "1x1", "align_corners": False},
    "no bias, 1x1 pooling": {"conv_bias": "none", "crp_kernel": 1, "crp_stages": 3, "upsample": "bicubic"},
    "aligned logits": {"upsample": "bilinear-aligned", "init": "kaiming", "width": 7, "deep_width": 9},
}
variants = pytest.mark.parametrize("options", list(VARIANTS.values()), ids=list(VARIANTS))


def build(num_classes: int = 3, lively: bool = True, **options) -> RefineNet:
    """A narrow network; ``lively`` weights keep the signal's scale, so that every path shows in the result.

    Batch norm and biases are random too: timm starts residual branches at exactly 0, where every ReLU after one stands
    on its kink.
    """
    torch.manual_seed(0)
    model = RefineNet(num_classes, **{"trunk": "resnet18", "width": 8, "deep_width": 12, "dropout": 0.1, **options})
    for module in [*model.blocks.modules(), model.classifier] if lively else []:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
    for norm in norms(model) if lively else []:
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return model


def norms(model: RefineNet) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


# -- the decoder, written out ------------------------------------------------------------------------------------------


def plain_units(units: nn.Sequential, x: Tensor) -> Tensor:
    for unit in units:
        skip = x if unit.skip == "raw" else F.relu(x)
        x = skip + unit.conv2(F.relu(unit.conv1(F.relu(x))))
    return x


def plain_network(model: RefineNet, batch: Tensor, reads: list[list[int]], corners: bool, order: str) -> Tensor:
    """Logits at 1/4, from the paper's figures: ``reads`` are the levels (1/4 is 0) of each block."""
    pyramids = []
    for k, scale in enumerate(model.scales):
        size = [int(side * scale + 0.5) for side in batch.shape[2:]]
        scaled = batch if scale == 1 else F.interpolate(batch, size, mode="bilinear")
        pyramids.append(model.trunks[k % len(model.trunks)](scaled))
    y = None
    for levels, block in zip(reads, model.blocks, strict=True):
        maps = [pyramid[level] for level in levels for pyramid in pyramids]
        paths = [units(conv(x)) for conv, x, units in zip(block.adapt, maps, _plain(block), strict=False)]
        if y is not None:
            paths.append(plain_units(block.units[-1], y))
        if len(paths) > 1:
            paths = [conv(x) for conv, x in zip(block.fusion.convs, paths, strict=True)]
            size = [max(x.shape[d] for x in paths) for d in (2, 3)]
            paths = [F.interpolate(x, size, mode="bilinear", align_corners=corners) for x in paths]
        y = t = F.relu(sum(paths))
        for conv in block.pooling.convs:
            t = conv(pool(t)) if order == "pool-conv" else pool(conv(t))
            y = y + t
        y = plain_units(block.output, y)
    return model.classifier(y)


def _plain(block: nn.Module) -> list:
    return [lambda x, units=units: plain_units(units, x) for units in block.units]


def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 5, stride=1, padding=2)


READS = {1: [[0, 1, 2, 3]], 2: [[2, 3], [0, 1]], 4: [[3], [2], [1], [0]]}


@variants
def test_logits_are_those_of_the_network_written_out(options):
    model = build(**options).double().eval()
    batch = images(2, 3, 65, 97, dtype=torch.float64)
    corners, order = options.get("align_corners", True), options.get("crp_order", "pool-conv")
    with torch.no_grad():
        quarter = plain_network(model, batch, READS[options.get("cascades", 4)], corners, order)
        upsample = options.get("upsample", "bilinear")
        mode = "bicubic" if upsample == "bicubic" else "bilinear"
        expected = F.interpolate(quarter, (65, 97), mode=mode, align_corners=upsample == "bilinear-aligned")
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(batch), expected, rtol=1e-10, atol=1e-10)
        model.upsample = None
        torch.testing.assert_close(model(batch), quarter, rtol=1e-10, atol=1e-10)


@variants
def test_gradients_of_the_whole_network_in_float64(options):
    """Against finite differences, in random directions of the images and of every parameter together."""
    model = build(**options).double().eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    batch = images(1, 3, 40, 33, dtype=torch.float64).requires_grad_()
    leaves, gy = [batch, *parameters], images(1, 3, 40, 33, dtype=torch.float64).flip(2)
    grads = torch.autograd.grad((model(batch) * gy).sum(), leaves)
    generator, step = torch.Generator().manual_seed(2), 1e-8  # few ReLUs and pools change sides in it

    def loss(directions: list[Tensor], sign: int) -> Tensor:
        moved = [p.detach() + sign * step * d for p, d in zip(leaves, directions, strict=True)]
        state = dict(zip(names, moved[1:], strict=True))
        with torch.no_grad():
            return (torch.func.functional_call(model, state, moved[0]) * gy).sum()

    for _ in range(3):
        scales = [0.1 * p.detach().abs().mean() + 1e-3 for p in leaves]
        directions = [
            s * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p, s in zip(leaves, scales, strict=True)
        ]
        expected = (loss(directions, 1) - loss(directions, -1)) / (2 * step)
        found = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        size = sum((g * d).square().sum() for g, d in zip(grads, directions, strict=True)).sqrt()
        assert abs(found - expected) <= 1e-4 * size, f"{found} against {expected}"


@variants
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_step_of_training(options, autocast):
    model = build(**options).train()
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01), momentum=0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # Where it multiplies by AMX, oneDNN's strided convolution of a 3x2 map now and then gives NaN of finite bfloat16.
    without = autocast and torch.cpu._is_amx_tile_supported()
    with torch.backends.mkldnn.flags(enabled=not without):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images(2, 3, 64, 48)).float(), torch.randint(0, 3, (2, 64, 48)))
        loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) >= 0.9 * len(before)
    model.eval()
    with torch.no_grad():
        one, two = model(images(2, 3, 64, 48)), model(images(2, 3, 64, 48))
        assert torch.equal(one, two), "no dropout in eval"
        model.train()
        assert not torch.equal(model(images(2, 3, 64, 48)), model(images(2, 3, 64, 48))), "dropout in training"


@variants
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 7, 200), (0, 3, 33, 65)], ids=str)
def test_any_size(options, shape):
    model = build(**options).eval()
    with torch.no_grad():
        logits = model(images(*shape))
    assert logits.shape == (shape[0], 3, *shape[2:]) and logits.isfinite().all()


@pytest.mark.parametrize("options", [{"freeze_bn": True}, {"freeze_bn": True, "scales": (1.2, 0.6)}], ids=str)
def test_a_pixel_trains_with_batch_norm_frozen(options):
    model = build(**options).train()
    model(images(1, 3, 1, 1)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# -- frozen batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("trunk", ["resnet18", "mobilenetv2_100"])
def test_batch_norm_is_frozen_when_asked(frozen, trunk):
    model = build(trunk=trunk, freeze_bn=frozen).train()
    before = copy.deepcopy([norm.state_dict() for norm in norms(model)])
    parameters = {id(p) for group in model.param_groups(0.1) for p in group["params"]}
    model(images(2, 3, 64, 64)).square().mean().backward()
    torch.optim.SGD(model.param_groups(0.1)).step()
    for norm, then in zip(norms(model), before, strict=True):
        assert norm.training != frozen
        assert torch.equal(norm.running_mean, then["running_mean"]) == frozen
        assert norm.weight.requires_grad != frozen and (id(norm.weight) in parameters) != frozen
        assert not frozen or torch.equal(norm.weight, then["weight"])
    assert model.eval().train().training
    assert all(norm.training != frozen for norm in norms(model))


def test_batch_norm_is_frozen_where_weights_were_loaded(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    assert build(pretrained=True).freeze_bn
    assert not build(pretrained=True, freeze_bn=False).freeze_bn
    assert not build().freeze_bn and build(freeze_bn=True).freeze_bn


# -- identity mappings -------------------------------------------------------------------------------------------------


class Maps(nn.Module):
    """In the trunk's place: four given maps."""

    maps: list[Tensor]

    def forward(self, batch: Tensor) -> list[Tensor]:
        return self.maps


def additive(model: RefineNet) -> bool:
    """Whether logits are linear in each trunk map, with residual branches zeroed and without CRP."""
    with torch.no_grad():
        model.classifier.bias.zero_()
        for module in model.blocks.modules():
            if isinstance(module, ResidualConvUnit):
                for p in module.conv2.parameters():
                    p.zero_()
        for block in model.blocks:
            block.pooling = nn.Identity()  # what is left of it but for its one ReLU
    model.trunks[0] = Maps()

    def logits(maps: list[Tensor]) -> Tensor:
        model.trunks[0].maps = maps
        with torch.no_grad():
            return model(images(1, 3, 64, 64, dtype=torch.float64))

    sizes, linear = [(64, 16), (128, 8), (256, 4), (512, 2)], True
    first = [images(1, c, s, s, dtype=torch.float64) for c, s in sizes]
    for level in range(4):
        second = [torch.zeros_like(m) for m in first]
        second[level] = torch.flip(first[level], (1, 3))
        both = [a + 3 * b for a, b in zip(first, second, strict=True)]
        assert logits(second).abs().max() > 1e-3, "the map reaches the logits"
        linear &= torch.allclose(logits(both), logits(first) + 3 * logits(second), rtol=1e-10, atol=1e-10)
    return linear


@pytest.mark.parametrize("cascades", [1, 2, 4])
@pytest.mark.parametrize("light_weight", [False, True])
def test_identity_mappings(cascades, light_weight):
    """But for the ReLU of each CRP the way from a trunk map to the logits is linear."""
    assert additive(build(cascades=cascades, light_weight=light_weight, upsample=False).double().eval())


def test_a_relu_on_the_way_would_be_seen():
    assert not additive(build(rcu_skip="relu", upsample=False).double().eval())


# -- presets, initialisation, parameter groups -------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets(name):
    model = RefineNet.from_preset(name, 4, **{"trunk": "resnet50", "width": 8, "deep_width": 8} | mobile(name)).eval()
    with torch.no_grad():
        assert model(images(1, 3, 33, 47)).shape == (1, 4, 33, 47)
    stages = {len(block.pooling.convs) for block in model.blocks}
    assert stages == ({2} if name.startswith("paper") else {4})


def mobile(name: str) -> dict:
    return {"trunk": "mobilenetv2_100"} if "mobilenet" in name else {}


def test_initialisation():
    paper, kaiming = build(lively=False, width=64), build(lively=False, width=64, init="kaiming")
    convs = [m for m in [*paper.blocks.modules(), paper.classifier] if isinstance(m, nn.Conv2d)]
    assert all(abs(m.weight.std().item() - 0.01) < 2e-3 for m in convs)
    units = [m for m in kaiming.blocks.modules() if isinstance(m, ResidualConvUnit)]
    assert units and not any(unit.conv2.weight.any() for unit in units)
    with torch.no_grad():
        spread = [m.eval()(images(2, 3, 96, 96)).std() for m in (paper, kaiming)]
    assert spread[0] < spread[1] / 5 and 0.01 < spread[1] < 1


@pytest.mark.parametrize("init", ["paper", "kaiming"])
def test_both_initialisations_train(init):
    model = build(lively=False, init=init, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch, losses = images(2, 3, 64, 64), []
    target = (batch[:, 0] > batch[:, 1]).long() + (batch[:, 2] > 0).long()
    target = F.max_pool2d(target.float(), 15, stride=1, padding=7).long()
    target[:, :32] = 0
    for _ in range(30):
        loss = F.cross_entropy(model(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0] / 2, losses


@pytest.mark.parametrize(
    "trunk, full, light",
    [
        ("resnet50", 99_060_309, 27_357_525),
        ("resnet101", 118_052_437, 46_349_653),
        ("resnet152", 133_696_085, 61_993_301),
    ],
)
def test_numbers_of_parameters(trunk, full, light):
    """The published ones: 99.1, 118.05 and 133.7 M; light-weight 27.36, 46.35 and 61.99 M."""
    with torch.device("meta"):
        networks = [RefineNet(21, trunk, crp_stages=4, light_weight=is_light) for is_light in (False, True)]
    assert [sum(p.numel() for p in network.parameters()) for network in networks] == [full, light]


def test_parameter_groups():
    model = build(freeze_bn=True)
    model.extra = nn.Conv2d(3, 3, 1)
    trunk, decoder = model.param_groups(lr=0.5, trunk_scale=0.2, weight_decay=1e-3)
    assert (trunk["lr"], decoder["lr"], trunk["weight_decay"], decoder["weight_decay"]) == (0.1, 0.5, 1e-3, 1e-3)
    grouped = [id(p) for group in (trunk, decoder) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# -- prediction and folding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3, 13, 40])
@pytest.mark.parametrize("upsample", [True, False, "bicubic"])
def test_predictions_are_those_of_softmax(classes, upsample):
    model = build(classes, upsample=upsample).train()
    batch = images(2, 3, 45, 67)
    found = model.predict(batch)
    assert model.training and model.dropout.training, "the mode comes back"
    model.eval()
    model.upsample = model.upsample or "bilinear"
    with torch.no_grad():
        probability, label = model(batch).softmax(1).max(1)
    assert torch.equal(found.classes, label) and found.classes.dtype == torch.int64
    torch.testing.assert_close(found.probabilities, probability)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_predictions_of_classes_that_are_not_finite(value):
    model = build(13).eval()
    with torch.no_grad():
        model.classifier.bias[:4] = value
        probability, label = model(images(1, 3, 40, 50)).softmax(1).max(1)
    found = model.predict(images(1, 3, 40, 50))
    assert torch.equal(found.classes, label)
    torch.testing.assert_close(found.probabilities, probability, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_predictions_in_other_dtypes(dtype):
    model, batch = build(13).to(dtype).eval(), images(2, 3, 40, 50).to(dtype)
    found, wide = model.predict(batch), torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        probability, label = model(batch).to(wide).softmax(1).max(1)
    assert torch.equal(found.classes, label) and found.probabilities.dtype == wide
    torch.testing.assert_close(found.probabilities, probability)
    assert model.predict(batch[:0]).classes.shape == (0, 40, 50)


def test_prediction_never_holds_all_full_size_logits():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            y = func(*args, **(kwargs or {}))
            if isinstance(y, Tensor) and y.dtype.is_floating_point:
                largest = max(largest, y.numel())
            return y

    model = build(64, width=8).eval()
    with Watch():
        model.predict(images(1, 3, 128, 128))
    assert largest <= 64 * 128 * 128 / 4


@variants
def test_folded_batch_norm_gives_the_same_logits(options):
    model = build(**options).double().eval()
    folded, batch = model.fold_batch_norm(), images(2, 3, 65, 43, dtype=torch.float64)
    assert norms(model) and not norms(folded) and not folded.training
    convs = [m for trunk in folded.trunks for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(m, Convolution) == (m.kernel_size == (3, 3) and Convolution.covers(m)) for m in convs)
    with torch.no_grad():
        torch.testing.assert_close(folded(batch), model(batch), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"batch norm folded|trunk 'mobile|cascades|scales"):
        folded.to_published_state_dict()


# -- what contradicts itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"cascades": 3}, ValueError, "cascades: expected one of 1, 2, 4, got 3"),
        ({"cascades": "4"}, TypeError, "cascades: expected an integer, got '4'"),
        ({"scales": (1.2, 0.6), "cascades": 1}, ValueError, "scales: expected one scale where cascades=1"),
        ({"scales": (1.2, 0.6), "cascades": 2}, ValueError, "several need cascades=4"),
        ({"scales": ()}, ValueError, "scales: expected at least one"),
        ({"scales": 1.0}, TypeError, "scales: expected a list or tuple, got float"),
        ({"scales": (0.0, 1.0)}, ValueError, "scales: expected positive numbers, got 0.0"),
        ({"scales": ("1", 1.0)}, TypeError, "scales: expected numbers, got '1'"),
        ({"share_trunk": True}, ValueError, "share_trunk: expected False where there is one scale"),
        ({"crp_order": "conv"}, ValueError, "crp_order: expected one of 'pool-conv', 'conv-pool', got 'conv'"),
        ({"rcu_skip": "none"}, ValueError, "rcu_skip: expected one of 'raw', 'relu', got 'none'"),
        ({"conv_bias": True}, ValueError, "conv_bias: expected one of 'first', 'both', 'none', got True"),
        ({"head": "5x5"}, ValueError, "head: expected one of '3x3', '1x1', got '5x5'"),
        ({"init": "xavier"}, ValueError, "init: expected one of 'paper', 'kaiming', got 'xavier'"),
        ({"upsample": "nearest"}, ValueError, "upsample: expected True, False or one of bilinear.*, got 'nearest'"),
        ({"light_weight": 1}, TypeError, "light_weight: expected a bool, got 1"),
        ({"freeze_bn": 1}, TypeError, "freeze_bn: expected a bool, got 1"),
        ({"crp_kernel": 5}, ValueError, "crp_kernel: expected 1 or 3, got 5"),
        ({"crp_kernel": 0}, ValueError, "crp_kernel: expected an integer >= 1, got 0"),
        ({"pretrained": 1}, TypeError, "pretrained: expected a bool, got 1"),
        ({"light_weight": True, "rcu_skip": "relu"}, ValueError, "rcu_skip: expected 'raw' where light_weight"),
        ({"light_weight": True, "conv_bias": "both"}, ValueError, "conv_bias: expected 'first' where light_weight"),
        ({"trunk_stride": "2x2"}, ValueError, "trunk_stride: expected one of '3x3', '1x1', got '2x2'"),
        ({"trunk_stride": "1x1"}, ValueError, "trunk_stride: expected '3x3' for trunk 'resnet18', which has no"),
        ({"deep_width": 0}, ValueError, "deep_width: expected an integer >= 1, got 0"),
    ],
)
def test_contradictions(options, error, said):
    with pytest.raises(error, match=said):
        RefineNet(**{"num_classes": 5, "trunk": "resnet18", **options})


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name: expected one of 'paper', .*'light-weight', .*got 'nice'"):
        RefineNet.from_preset("nice", 5)
