"""``accelerate``: however a block is called, it computes what it did, or its own forward does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ports
from ports import image, randomised
from refinenet_fast import accelerate, explain, restore
from refinenet_fast.testing import relative_l2


def unit(activation: nn.Module | None = None) -> nn.Module:
    return randomised(ports.ResidualConvUnit_custom(8, activation or nn.ReLU()))


def op_ran(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    with torch.profiler.profile() as profile:
        model(*args, **kwargs)
    return any(event.key.startswith("refinenet_fast::") for event in profile.key_averages())


class NamedFeatureFusionLayer(nn.Module):
    """Hugging Face's signature: Depth Anything's fusion layer, whose arguments have names and an order."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(8, 8, 1)
        self.residual_layer1, self.residual_layer2 = NamedPreActResidualLayer(), NamedPreActResidualLayer()

    def forward(
        self,
        hidden_state: Tensor,  # (N, 8, H, W)
        residual: Tensor | None = None,  # (N, 8, H, W)
        size: Any = None,
    ) -> Tensor:  # (N, 8, H', W')
        if residual is not None:
            hidden_state = hidden_state + self.residual_layer1(residual)
        hidden_state = self.residual_layer2(hidden_state)
        size = (2 * hidden_state.shape[2], 2 * hidden_state.shape[3]) if size is None else size
        return self.projection(F.interpolate(hidden_state, size, mode="bilinear", align_corners=True))


class NamedPreActResidualLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution1, self.convolution2 = ports.conv3x3(8, True), ports.conv3x3(8, True)

    def forward(self, hidden_state: Tensor) -> Tensor:  # (N, 8, H, W), both
        return hidden_state + self.convolution2(F.relu(self.convolution1(F.relu(hidden_state))))


X, SKIP = image(1, 8, 6, 4), image(1, 8, 6, 4) + 1
CALLS = {
    "by name": ((), {"hidden_state": X, "residual": SKIP, "size": (9, 7)}),
    "some by name": ((X,), {"size": (9, 7), "residual": SKIP}),
    "all by position": ((X, SKIP, (9, 7)), {}),
    "a skip that is None": ((X, None, (9, 7)), {}),
    "a list": ((X, SKIP), {"size": [9, 7]}),
    "torch.Size": ((X, SKIP), {"size": torch.Size((9, 7))}),
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_by_name_and_by_position(call):
    model = accelerate(randomised(NamedFeatureFusionLayer()))
    args, kwargs = CALLS[call]
    assert op_ran(model, *args, **kwargs)
    got = model(*args, **kwargs)
    assert got.shape[2:] == (9, 7)
    assert relative_l2(got, restore(model)(*args, **kwargs)) < 1e-6


@pytest.mark.parametrize("size", [9, (torch.tensor(9), torch.tensor(7))])
def test_sizes_that_the_ops_do_not_take_are_the_blocks_own(size):
    model = accelerate(randomised(NamedFeatureFusionLayer()))
    got = model(X, SKIP, size=size)
    assert relative_l2(got, restore(model)(X, SKIP, size=size)) < 1e-6


@pytest.mark.parametrize("size", [(0, 5), (9.0, 7.0), (9,)])
def test_errors_about_sizes_are_the_blocks_own(size):
    model = accelerate(randomised(NamedFeatureFusionLayer()))
    with pytest.raises(Exception) as ours:
        model(X, size=size)
    with pytest.raises(Exception) as theirs:
        restore(model)(X, size=size)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


def test_a_convolution_called_by_name():
    model = accelerate(nn.Sequential(unit(), nn.Conv2d(8, 8, 3, padding=1)))
    assert op_ran(model[1], input=X)
    assert torch.equal(model[1](input=X), model[1](X))


@pytest.mark.parametrize("build", [unit, lambda: randomised(ports.FeatureFusionBlock(8))])
def test_errors_about_no_map_are_the_blocks_own(build):
    model = accelerate(build())
    with pytest.raises(Exception) as ours:
        model(None)
    with pytest.raises(Exception) as theirs:
        restore(model)(None)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


def test_more_maps_than_a_fusion_has_are_the_blocks_own():
    """MiDaS' block looks at a skip only where it is given two maps."""
    model = accelerate(randomised(ports.FeatureFusionBlock(8)))
    got = model(X, SKIP, SKIP)
    assert relative_l2(got, restore(model)(X.clone(), SKIP, SKIP)) < 1e-6


@pytest.mark.parametrize("inplace", [True, False])
def test_an_input_that_is_no_longer_overwritten_is_noted(inplace):
    """Who reads the skip again after the block gets what it was."""
    model = randomised(ports.FeatureFusionBlock_custom(8, inplace=inplace))
    fast, skip = accelerate(model, copy=True), SKIP.clone()
    fast(X.clone(), skip)
    assert torch.equal(skip, SKIP)
    model(X.clone(), skip)
    assert torch.equal(skip, F.relu(SKIP) if inplace else SKIP)
    notes = {row.name: row.note for row in explain(fast)}
    assert set(notes) == {"", "resConfUnit1", "resConfUnit2"}
    for note in notes.values():
        assert ("overwrote a map it was given" in note) if inplace else note is None
    assert {row.note for row in explain(model)} == {None}


TRANSFORMS = {
    "vmap": lambda f, x: torch.vmap(f)(x[None]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "forward mode": lambda f, x: forward_mode(f, x),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, x)(x),
    "torch.fx": lambda f, x: torch.fx.symbolic_trace(f)(x),
}


def forward_mode(f: nn.Module, x: Tensor) -> Tensor:  # (N, C, H, W), both
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_transforms_a_forward_sees_the_blocks_own(transform):
    """The ops have no rule for them; torch.jit.trace keeps PyTorch's operations, which need no refinenet_fast."""
    model = accelerate(nn.Sequential(randomised(NamedPreActResidualLayer()), nn.Conv2d(8, 8, 3, padding=1)))
    got = TRANSFORMS[transform](model, X)
    assert relative_l2(got, TRANSFORMS[transform](restore(model), X)) < 1e-6


@pytest.mark.parametrize("build", [NamedPreActResidualLayer, lambda: nn.Conv2d(8, 8, 3, padding=1)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_scripting_says_what_to_do_first(build):
    """TorchScript reads the source of a forward, and there is none that says what an accelerated block computes."""
    model = accelerate(nn.Sequential(build(), unit()))
    with pytest.raises(RuntimeError, match=r"torch.jit.script: .* accelerated .*call refinenet_fast.restore\(model\)"):
        torch.jit.script(model[0])
    with pytest.raises(RuntimeError, match="restore"):
        torch.jit.script(nn.Sequential(model[0]))
    assert torch.equal(torch.jit.script(restore(model)[0])(X), model[0](X))


COMPILED = {
    "vmap": lambda f, x: torch.compile(torch.vmap(f), backend="eager")(x[None]),
    "vmap of what is compiled": lambda f, x: torch.vmap(torch.compile(f, backend="eager"))(x[None]),
    "jvp": lambda f, x: torch.compile(lambda x: torch.func.jvp(f, (x,), (x,))[1], backend="eager")(x),
    "grad": lambda f, x: torch.compile(torch.func.grad(lambda x: f(x).square().sum()), backend="eager")(x),
    "forward mode": lambda f, x: torch.compile(forward_mode, backend="eager")(f, x),
}


@pytest.mark.parametrize("transform", COMPILED)
def test_compiled_and_transformed(transform):
    """What is compiled before, or afterwards, without the transform runs the ops."""
    model = accelerate(nn.Sequential(randomised(NamedPreActResidualLayer()), nn.Conv2d(8, 8, 3, padding=1)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert op_ran(compiled, X)
    got = COMPILED[transform](model, X)
    assert op_ran(compiled, X)
    torch._dynamo.reset()
    assert relative_l2(got, COMPILED[transform](restore(model), X)) < 1e-6


BLOCKS = {
    "unit": lambda: ports.ResidualConvUnit_custom(8, nn.ReLU()),
    "units": lambda: ports.RCUBlock(8, 2),
    "pooling": lambda: ports.CRPBlock(8, 2),
    "fusion without a projection": lambda: ports.FeatureFusionBlock(8),
    "fusion": lambda: ports.FeatureFusionBlock_custom(8),
    "convolution": lambda: nn.Sequential(unit(), nn.Conv2d(8, 8, 3, padding=1)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_the_dtype_under_autocast_is_the_blocks_own(name, given):
    """What is added stays float32 where it was so: PyTorch adds float32 to a convolution's bfloat16 in float32."""
    model = randomised(BLOCKS[name]())
    fast = accelerate(model, copy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = model(X.to(given)), fast(X.to(given))
        assert op_ran(fast, X.to(given))
    assert ours.dtype == theirs.dtype
    assert relative_l2(ours, theirs) < 2e-2


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_under_autocast_parameters_of_another_16_bit_type_are_the_blocks_own(name, given):
    """PyTorch casts those, too."""
    model = randomised(BLOCKS[name]()).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = accelerate(model, copy=True)(X.to(given))
        assert torch.equal(ours, model(X.to(given)))


@pytest.mark.parametrize("name", BLOCKS)
def test_under_autocast_errors_about_float64_are_the_blocks_own(name):
    model = accelerate(randomised(BLOCKS[name]()).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError) as ours:
            model(X)
        with pytest.raises(RuntimeError) as theirs:
            restore(model)(X)
    assert str(ours.value) == str(theirs.value)


def test_on_a_device_without_autocast():
    model = accelerate(randomised(ports.FeatureFusionBlock(8))).to("meta")
    assert model(X.to("meta")).shape == (1, 8, 12, 8)
