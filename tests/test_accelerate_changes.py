"""``accelerate``: what is changed in a model afterwards is seen, by the results and by ``explain``."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ports
from ports import image, randomised
from refinenet_fast import accelerate, explain, restore
from refinenet_fast.testing import relative_l2

X = image(1, 8, 6, 4)


class ResidualConvUnit_of_a_function(nn.Module):
    """Its activation is no module, and a factor no parameter."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = ports.conv3x3(8, True), ports.conv3x3(8, True)
        self.activation, self.factor = activation, 1.0

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x + self.factor * self.conv2(self.activation(self.conv1(self.activation(x))))


class ResidualConvUnit_of_attributes(ports.ResidualConvUnit):
    """What it computes is decided by its class, by methods and by a list."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__(8, nn.ReLU())
        self.factors, self.options = [1.0, (1.0,)], {"factor": 1.0}
        self.config = SimpleNamespace(factor=1.0)

    def scaled(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return self.factor * self.factors[0] * self.factors[1][0] * self.options["factor"] * self.config.factor * x

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x + getattr(self, "scale", 1.0) * self.scaled(super().forward(x) - x)


class Wrapper(nn.Module):
    """As checkpointing, sharding and adapters wrap modules: it does something of its own and passes attributes on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.wrapped = module

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return 2 * self.wrapped(x)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: an activation inside."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return F.silu(super().forward(x))


def no_longer_in_place(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def circular(conv: nn.Conv2d) -> None:
    """As people make pictures tileable."""
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def replaced_inside(conv: nn.Conv2d) -> None:
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b)


def of_a_unit(**options: object) -> nn.Module:
    return ports.ResidualConvUnit(8, **{"activation": nn.ReLU(), **options})


def in_place() -> nn.Module:
    return of_a_unit(activation=nn.ReLU(inplace=True))


def of_a_function(f: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    return ResidualConvUnit_of_a_function(f)


def attributes() -> nn.Module:
    return ResidualConvUnit_of_attributes()


def with_convolution() -> nn.Module:
    return nn.Sequential(of_a_unit(), nn.Conv2d(8, 8, 3, padding=1))


CHANGES = {
    "another activation": (of_a_unit, lambda m: setattr(m, "activation", nn.GELU()), "'activation' .* replaced"),
    "another function": (of_a_function, lambda m: setattr(m, "activation", F.gelu), "'activation' .* changed"),
    "another partial function": (
        lambda: of_a_function(functools.partial(F.leaky_relu, negative_slope=0.0)),
        lambda m: setattr(m, "activation", functools.partial(F.leaky_relu, negative_slope=0.2)),
        "'activation' .* changed",
    ),
    "another factor": (of_a_function, lambda m: setattr(m, "factor", 0.5), "'factor' .* changed"),
    "an attribute that hides the class's": (attributes, lambda m: setattr(m, "factor", 0.5), "'factor' .* changed"),
    "a method": (attributes, lambda m: setattr(m, "scaled", lambda x: 0.5 * x), "'scaled' .* changed"),
    "a new attribute": (attributes, lambda m: setattr(m, "scale", 0.5), "'scale' .* changed"),
    "a list's entry": (attributes, lambda m: m.factors.__setitem__(0, 0.5), "'factors' .* changed"),
    "a tuple in a list": (attributes, lambda m: m.factors.__setitem__(1, (0.5,)), "'factors' .* changed"),
    "a dict's entry": (attributes, lambda m: m.options.update(factor=0.5), "'options' .* changed"),
    "another object": (attributes, lambda m: setattr(m, "config", SimpleNamespace(factor=0.5)), "'config' .* changed"),
    "no longer in place": (in_place, no_longer_in_place, "'activation.inplace' .* changed"),
    "in a fusion, no longer in place": (
        lambda: ports.FeatureFusionBlock_custom(8, inplace=True),
        no_longer_in_place,
        "'resConfUnit1.activation.inplace' .* changed",
    ),
    "in a fusion, a wrapped unit": (
        lambda: ports.FeatureFusionBlock_custom(8),
        lambda m: setattr(m, "resConfUnit2", Wrapper(m.resConfUnit2)),
        "units are left alone",
    ),
    "in a fusion, a wider projection": (
        lambda: ports.FeatureFusionBlock_custom(8),
        lambda m: setattr(m, "out_conv", randomised(ports.conv3x3(8, True))),
        "expected a 1x1 convolution as 'out_conv'",
    ),
    "a batch norm with an activation": (
        lambda: of_a_unit(bn=True), lambda m: setattr(m, "bn1", randomised(BatchNormAct(8))), "got BatchNormAct",
    ),
    "a convolution's padding": (with_convolution, lambda m: circular(m[1]), "padding_mode=circular"),
    "a convolution's stride": (with_convolution, lambda m: setattr(m[1], "stride", (2, 2)), r"stride=\(2, 2\)"),
    "a convolution's inside": (with_convolution, lambda m: replaced_inside(m[1]), "expected plain"),
    "a unit's convolution's inside": (of_a_unit, lambda m: replaced_inside(m.conv1), "expected plain"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_brings_the_own_forward_back(case):
    build, change, reason = CHANGES[case]
    model = accelerate(randomised(build()))
    before = model(X.clone())
    assert all(row.op is not None and row.reason is None for row in explain(model))
    change(model)
    got, why = model(X.clone()), "; ".join(str(row.reason) for row in explain(model))
    want = restore(model)(X.clone())
    assert want.shape != before.shape or relative_l2(want, before) > 1e-3
    assert relative_l2(got, want) < 1e-6
    assert re.search(reason, why)


def test_marks_that_libraries_leave_change_nothing():
    """As replicas of ``DataParallel`` and sharded modules have them."""
    model = accelerate(randomised(attributes()))
    model._is_replica, model.activation._is_sharded = True, True
    assert [row.reason for row in explain(model)] == [None]


@pytest.mark.parametrize("change", [{"factor": 0.5}, {"factors": [0.5, (1.0,)]}, {"scale": 0.5}])
def test_attributes_changed_after_compiling(change):
    model = accelerate(randomised(attributes()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(X)
    vars(model).update(change)
    assert relative_l2(compiled(X), restore(model)(X)) < 1e-6


def other(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: 2 * forward(*args)


PATCHES = {  # model, class and name of the function, reason
    "a unit's": (of_a_unit, ports.ResidualConvUnit, "forward", "class ResidualConvUnit has been replaced"),
    "a unit's in a fusion": (
        lambda: ports.FeatureFusionBlock_custom(8), ports.ResidualConvUnit, "forward", "class ResidualConvUnit_custom",
    ),
    "a fusion's": (
        lambda: ports.FeatureFusionBlock_custom(8), ports.FeatureFusionBlock_custom, "forward", "FeatureFusionBlock_cu",
    ),
    "all convolutions'": (with_convolution, nn.Conv2d, "forward", "nn.Conv2d has been replaced"),
    "all convolutions' inside": (with_convolution, nn.Conv2d, "_conv_forward", "nn.Conv2d has been replaced"),
    "all batch norms'": (
        lambda: of_a_unit(bn=True), nn.modules.batchnorm._BatchNorm, "forward", "got BatchNorm2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PATCHES)
def test_a_patched_class_brings_the_own_forward_back(case, monkeypatch):
    build, kind, name, reason = PATCHES[case]
    model = accelerate(randomised(build()))
    before = model(X)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, other(getattr(kind, name)))
        got, why = model(X), "; ".join(str(row.reason) for row in explain(model))
        want = restore(copy.deepcopy(model))(X)
    assert relative_l2(want, before) > 1e-3
    assert relative_l2(got, want) < 1e-6
    assert re.search(reason, why)
    assert torch.equal(model(X), before)  # and undone, the ops run again


def test_a_patched_class_accelerated_again(monkeypatch):
    """With another forward that computes the same."""
    model = accelerate(randomised(of_a_unit()))
    forward = ports.ResidualConvUnit.forward
    monkeypatch.setattr(ports.ResidualConvUnit, "forward", lambda self, x: forward(self, x))
    assert "class ResidualConvUnit" in explain(model)[0].reason
    assert explain(accelerate(restore(model)))[0].reason is None
    assert explain(pickle.loads(pickle.dumps(model)))[0].reason is None


def test_a_class_patched_after_compiling(monkeypatch):
    model = accelerate(randomised(of_a_unit()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(X)
    monkeypatch.setattr(ports.ResidualConvUnit, "forward", other(ports.ResidualConvUnit.forward))
    assert relative_l2(compiled(X), restore(model)(X)) < 1e-6


def test_restored_and_accelerated_again_a_change_is_tried():
    model = accelerate(randomised(in_place()))
    no_longer_in_place(model)
    accelerate(restore(model))
    assert [row.reason for row in explain(model)] == [None]
    assert relative_l2(model(X), restore(model)(X)) < 1e-6


class ResidualConvUnit_made_anew(ports.ResidualConvUnit):
    """Its pickles and copies hold what it is made from, and no state."""

    def __init__(self, features: int) -> None:
        super().__init__(features, nn.ReLU())
        randomised(self)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.conv1.in_channels,)


class ResidualConvUnit_made_by_name(ResidualConvUnit_made_anew):
    def __reduce__(self) -> tuple[object, ...]:
        return ResidualConvUnit_made_by_name, (self.conv1.in_channels,), None


@pytest.mark.parametrize("kind", [ResidualConvUnit_made_anew, ResidualConvUnit_made_by_name])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_a_block_without_a_state(kind, copied):
    model = accelerate(kind(8))
    other = copied(model)
    assert [(row.op, row.reason) for row in explain(other)] == [("rcu", None)]
    assert torch.equal(other(X), model(X))
    assert type(restore(other)) is kind and type(restore(copied(other))) is kind
    assert type(restore(model)) is kind


@pytest.mark.parametrize(
    "build", [of_a_function, lambda: of_a_function(functools.partial(F.relu, inplace=False)), attributes]
)
def test_attributes_are_recognised_in_copies_pickles_and_compiled(build):
    model = accelerate(randomised(build()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [row.reason for row in explain(other)] == [None]
        assert torch.equal(other(X), model(X))
    torch._dynamo.reset()
    exported = torch.export.export(model, (X,), strict=True)
    assert "refinenet_fast" in str(exported.graph)


def test_an_activation_changed_after_compiling():
    model = accelerate(randomised(of_a_unit()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(X)
    model.activation = nn.GELU()
    assert relative_l2(compiled(X), restore(model)(X)) < 1e-6


def test_restore_leaves_no_trace():
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom))
    before = [set(vars(module)) for module in model.modules()]
    restore(accelerate(model))
    assert [set(vars(module)) for module in model.modules()] == before
