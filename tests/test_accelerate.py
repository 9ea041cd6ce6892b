"""``accelerate``: blocks found by name and proved by a trial, left alone with a reason, and given back to the bit."""

from __future__ import annotations

import copy
import pickle
import random
import re
import threading
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ports
import refinenet_fast
from ports import assert_same, gradients, image, randomised, replaced
from refinenet_fast import RefineNet, accelerate, explain, restore
from refinenet_fast.testing import relative_l2

SIZES = [(6, 4), (14, 10), (2, 18)]


DECODERS = {
    "MiDaS v2.1": (ports.FeatureFusionBlock, {}),
    "MiDaS v3": (ports.FeatureFusionBlock_custom, {}),
    "isl-org/DPT, batch norm": (ports.FeatureFusionBlock_custom, {"bn": True}),
    "Depth Anything": (ports.FeatureFusionBlock_custom, {"align_corners": False}),
    "VGGT": (ports.FeatureFusionBlock_custom, {"inplace": True}),
}


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_computes_what_it_did(family):
    block, options = DECODERS[family]
    model = randomised(ports.Decoder(block, **options))
    assert_same(model, *((2, 8, *size) for size in SIZES))
    fast = accelerate(model, copy=True)
    assert replaced(fast) == {
        "layer_rn.0": "conv3x3",
        "layer_rn.1": "conv3x3",
        "output_conv.0": "conv3x3",
        **{f"refinenet{k}": "rcu, fuse" for k in (1, 2)},
        **{f"refinenet{k}.resConfUnit{i}": "rcu" for k in (1, 2) for i in (1, 2)},
    }
    assert all(row.reason is None for row in explain(fast))
    assert set(replaced(model).values()) == {None}  # a copy was asked for


def test_a_block_that_upsamples_to_a_size_and_halves_the_channels():
    block = randomised(ports.FeatureFusionBlock_custom(6, expand=True, size=(9, 13)))
    fast = accelerate(block, copy=True)
    for xs, size in (((image(1, 6, 5, 4),), None), ((image(1, 6, 5, 4), image(1, 6, 5, 4)), (7, 11))):
        assert relative_l2(fast(*xs, size=size), block(*xs, size=size)) < 1e-6


def test_a_block_without_a_skip():
    block = randomised(ports.FeatureFusionBlock_custom(6, has_residual=False, inplace=True))
    assert_same(block, (2, 6, 5, 7))
    assert replaced(accelerate(block)) == {"": "rcu, fuse", "resConfUnit2": "rcu"}


def test_a_block_that_has_to_be_given_its_skip():
    block = randomised(ports.FeatureFusionBlock_vggt(6, inplace=True))
    fast = accelerate(block, copy=True)
    assert replaced(fast) == {"": "rcu, fuse", "resConfUnit1": "rcu", "resConfUnit2": "rcu"}
    x, skip = image(1, 6, 5, 4), image(1, 6, 5, 4) + 1
    assert relative_l2(fast(x, skip, size=(9, 7)), block(x.clone(), skip.clone(), size=(9, 7))) < 1e-6


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_published_refinenets(kernel_size):
    model = nn.Sequential(ports.RCUBlock(6, 3), nn.ReLU(), ports.CRPBlock(6, 4, kernel_size), ports.RCUBlock(6, 2))
    assert_same(randomised(model), *((2, 6, *size) for size in SIZES))
    assert replaced(accelerate(model)) == {"0": "rcu", "2": "crp", "3": "rcu"}


def test_state_dict_restore_copies_and_pickles():
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom, bn=True))
    x = image(2, 8, 6, 4)
    before, y = copy.deepcopy(model.state_dict()), model(x)
    types = [type(module) for module in model.modules()]
    assert accelerate(model) is model
    fast = model(x)
    assert list(model.state_dict()) == list(before)
    assert [type(m).__name__ for m in model.modules()] == [kind.__name__ for kind in types]
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), types))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), fast)
        assert replaced(other) == replaced(model)
    assert restore(model) is model
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model(x), y)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_twice_changes_nothing_and_says_nothing():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock)))
    types = [type(module) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model)
    assert [type(module) for module in model.modules()] == types


def test_training_goes_on():
    """Five steps of both from the same weights; batch norm in training is its own."""
    models = [randomised(ports.Decoder(ports.FeatureFusionBlock_custom, bn=True), seed=3).train() for _ in range(2)]
    accelerate(models[0])
    reasons = {row.reason for row in explain(models[0])}
    assert reasons == {None, "batch norm in training, or without statistics"}
    losses = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(5):
            optimizer.zero_grad()
            loss = model(image(2, 8, 6, 2 + 2 * step)).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert {row.reason for row in explain(models[0].eval())} == {None}


def test_training_without_batch_norm_runs_the_ops():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock_custom))).train()
    with torch.profiler.profile() as profile:
        model(image(1, 8, 6, 4)).sum().backward()
    ran = {event.key for event in profile.key_averages()}
    assert {"refinenet_fast::rcu_train", "refinenet_fast::fuse_train", "refinenet_fast::rcu_backward"} <= ran


def test_autocast():
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom))
    x = image(1, 8, 14, 10)
    truth = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = model(x), accelerate(model, copy=True)(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_l2(ours, truth) <= 2 * relative_l2(theirs, truth)


def test_compiled_after_it_is_one_graph():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock_custom, bn=True)))
    x = image(1, 8, 6, 4)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert relative_l2(y, model(x)) < 1e-6


def test_compiled_before_it_is_left_alone():
    model = torch.compile(randomised(ports.Decoder(ports.FeatureFusionBlock)), backend="eager")
    with pytest.warns(UserWarning, match="left alone"):
        accelerate(model)
    assert {row.op for row in explain(model)} == {None}
    assert {row.reason for row in explain(model)} == {"compiled: accelerate the model before compiling it"}


def test_hooks_on_a_block_run_and_hooks_inside_it_bring_its_own_forward_back():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock_custom)))
    x, seen = image(1, 8, 6, 4), []
    want = model(x)
    model.refinenet1.register_forward_hook(lambda module, args, y: seen.append("block"))
    inside = model.refinenet1.resConfUnit2.conv1.register_forward_hook(lambda module, args, y: seen.append("conv"))
    assert relative_l2(model(x), want) < 1e-6
    assert seen == ["conv", "block"]
    reasons = {row.name: row.reason for row in explain(model)}
    assert "'resConfUnit2.conv1' has hooks" in reasons["refinenet1"]
    assert "'conv1' has hooks" in reasons["refinenet1.resConfUnit2"]
    assert reasons["refinenet1.resConfUnit1"] is None
    inside.remove()
    assert torch.equal(model(x), want)


def test_a_block_whose_forward_another_library_replaced_is_left_alone():
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom))
    unit = model.refinenet1.resConfUnit1
    unit.forward = unit.forward  # as device maps do
    accelerate(model)
    rows = {row.name: row for row in explain(model)}
    assert rows["refinenet1.resConfUnit1"].op is None
    assert "replaced already" in rows["refinenet1.resConfUnit1"].reason
    assert rows["refinenet1"].op is None and "units" in rows["refinenet1"].reason
    assert rows["refinenet2"].op == "rcu, fuse"


def test_under_distributed_data_parallel(tmp_path):
    """One process: the wrapper finds the parameters, reduces their gradients, and the model computes what it did."""
    model = randomised(ports.Decoder(ports.FeatureFusionBlock_custom))
    del model.refinenet2.resConfUnit1  # takes no part: DistributedDataParallel would wait for it
    x = image(1, 8, 6, 4)
    want = gradients(copy.deepcopy(model), x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = accelerate(nn.parallel.DistributedDataParallel(model))
        assert {row.op for row in explain(wrapped)} == {"conv3x3", "rcu", "rcu, fuse"}
        y = wrapped(x)
        gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        y.backward(gy)
    finally:
        torch.distributed.destroy_process_group()
    assert relative_l2(y, want[0]) < 1e-4
    assert max(map(relative_l2, (p.grad for p in model.parameters()), want[1:])) < 1e-3


def test_data_parallel_replicas_use_their_own_parameters():
    """What ``DataParallel`` does on one device: a shallow copy of the module with parameters of its own."""
    block = accelerate(randomised(ports.ResidualConvUnit_custom(4, nn.ReLU())))
    replica = block._replicate_for_data_parallel()
    replica.conv1, replica.conv2 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
    x = image(1, 4, 5, 5)
    want = x + replica.conv2(F.relu(replica.conv1(F.relu(x))))
    assert relative_l2(replica(x), want) < 1e-6


def test_a_parametrized_weight_is_used_and_survives_restore():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock_custom)))
    nn.utils.parametrizations.weight_norm(model.output_conv[0])
    x = image(1, 8, 6, 4)
    want = model(x)
    restore(model)
    assert relative_l2(model(x), want) < 1e-5
    assert isinstance(model.output_conv[0], nn.Conv2d) and set(replaced(model).values()) == {None}


def test_restoring_a_copy_of_a_parametrized_model_leaves_the_model_accelerated():
    model = accelerate(randomised(ports.Decoder(ports.FeatureFusionBlock_custom)))
    nn.utils.parametrizations.weight_norm(model.output_conv[0])
    other = copy.deepcopy(model)
    restore(other)
    assert "output_conv.0" not in replaced(other)
    assert replaced(model)["output_conv.0"] == "conv3x3"
    for each in (model, other):
        nn.utils.parametrize.remove_parametrizations(each.output_conv[0], "weight")
    assert relative_l2(model(image(1, 8, 6, 4)), other(image(1, 8, 6, 4))) < 1e-5
    assert type(other.output_conv[0]) is nn.Conv2d


class ResidualConvUnit_with_state(ports.ResidualConvUnit):
    """What is pickled is its own affair."""

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return ResidualConvUnit_with_state, (8, nn.ReLU()), {**vars(self), "pickled": True}


def test_pickles_hold_what_the_blocks_own_class_says():
    unit = pickle.loads(pickle.dumps(accelerate(randomised(ResidualConvUnit_with_state(8, nn.ReLU())))))
    assert unit.pickled and replaced(unit) == {"": "rcu"}


def test_models_on_the_meta_device_are_accelerated_before_they_have_weights():
    with torch.device("meta"):
        model = ports.Decoder(ports.FeatureFusionBlock_custom)
    accelerate(model)
    model = randomised(model.to_empty(device="cpu"))
    x = image(1, 8, 6, 4)
    assert relative_l2(model(x), restore(copy.deepcopy(model))(x)) < 1e-5


@pytest.mark.parametrize("shape", [(8, 6, 4), (0, 8, 6, 4)])
def test_inputs_that_the_ops_do_not_take_are_the_blocks_own(shape):
    """Without a batch dimension; and an empty batch, which the ops take."""
    block = randomised(ports.ResidualConvUnit_custom(8, nn.ReLU()))
    x = image(*shape)
    assert torch.equal(accelerate(block, copy=True)(x), block(x))


def test_errors_are_the_blocks_own():
    block = accelerate(randomised(ports.FeatureFusionBlock_custom(6)))
    with pytest.raises(RuntimeError, match="must match the size"):
        block(image(1, 6, 5, 4), image(1, 6, 4, 4))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [accelerate, restore, explain])
@pytest.mark.parametrize("model", [None, "dpt", [nn.ReLU()], nn.ReLU])
def test_what_is_no_module(function, model):
    with pytest.raises(TypeError, match=f"model: expected an nn.Module, got {type(model).__name__}"):
        function(model)


def test_a_copy_that_is_no_bool():
    with pytest.raises(TypeError, match="copy: expected a bool, got 'yes'"):
        accelerate(nn.ReLU(), copy="yes")


def test_nothing_to_replace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    with pytest.warns(UserWarning, match=r"expected blocks whose classes are named .*ResidualConvUnit.*Sequential"):
        assert accelerate(model) is model
    assert type(model[0]) is nn.Conv2d


def test_this_packages_own_network_has_nothing_to_replace():
    model = RefineNet(3, trunk="resnet18", width=8, deep_width=8)
    types = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="left alone"):  # the trunk's blocks, which have a unit's parts
        accelerate(model)
    assert [type(module) for module in model.modules()] == types


class ResidualConvUnit_other(ports.ResidualConvUnit):
    """The name and the parts of one, with another meaning."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return super().forward(x) + 0.01 * x


class ScaledConvolution(nn.Conv2d):
    """As a low-rank adapter that starts at nothing: the numbers are those of a plain convolution, still."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W); (N, K, H, W)
        return super().forward(x) * 1.0


class ResidualConvUnit_dropping(ports.ResidualConvUnit):
    """In eval it computes what the others do."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x + F.dropout(super().forward(x) - x, 0.1, self.training)


class CRPBlock_of_pyramids(ports.CRPBlock):
    """Of another meaning: its stages are sizes."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.n_stages = [1, 2]

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x


CRPBlock_of_pyramids.__name__ = "CRPBlock"


class ResidualConvUnit_of_a_tensor(ports.ResidualConvUnit):
    """Which can be changed in place at any time, unseen."""

    def __init__(self) -> None:
        super().__init__(8, nn.ReLU())
        self.factor = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x + self.factor * (super().forward(x) - x)


def grouped(unit: nn.Module) -> nn.Module:
    unit.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
    return unit


def adapted(unit: nn.Module) -> nn.Module:
    unit.conv2 = ScaledConvolution(8, 8, 3, padding=1)
    return unit


def bare(unit: nn.Module) -> nn.Module:
    del unit.conv2
    return unit


LOOKALIKES = {
    "another sum": (lambda: ResidualConvUnit_other(8, nn.ReLU()), "not that of rcu: it differs by"),
    "another activation": (lambda: ports.ResidualConvUnit(8, nn.GELU()), "not that of rcu: it differs by"),
    "an activation with a ceiling": (lambda: ports.ResidualConvUnit(8, nn.ReLU6()), "not that of rcu: it differs by"),
    "smooth about zero": (lambda: ports.ResidualConvUnit(8, nn.Softplus(20)), "not that of rcu: it differs by"),
    "smooth, but less": (lambda: ports.ResidualConvUnit(8, nn.Softplus(200)), "not that of rcu: it differs by"),
    "a high ceiling": (lambda: ports.ResidualConvUnit(8, nn.Hardtanh(0, 1e3)), "not that of rcu: it differs by"),
    "dropout": (lambda: ResidualConvUnit_dropping(8, nn.ReLU()), "in training, it draws random numbers"),
    "other attributes": (CRPBlock_of_pyramids, "the ops cannot run its parts: .*list"),
    "grouped": (lambda: grouped(ports.ResidualConvUnit(8, nn.ReLU())), "expected plain 3x3 or 1x1 .*groups=2"),
    "adapted": (lambda: adapted(ports.ResidualConvUnit(8, nn.ReLU())), "expected plain 3x3 or 1x1 .*ScaledConv"),
    "no parts": (lambda: bare(ports.ResidualConvUnit(8, nn.ReLU())), "parts that its class should have: .*conv2"),
    "a tensor": (ResidualConvUnit_of_a_tensor, "neither a parameter nor a buffer, 'factor'"),
    "three stages": (lambda: ports.RCUBlock(8, 1, n_stages=3), "expected 2 convolutions a unit .*, got 3"),
    "wider upsampling": (lambda: ports.FeatureFusionBlock_custom(8, width_ratio=1.5), "not that of rcu, fuse: it"),
}


@pytest.mark.parametrize("case", LOOKALIKES)
def test_a_lookalike_is_left_alone_and_named(case):
    build, reason = LOOKALIKES[case]
    model = nn.Sequential(build(), ports.ResidualConvUnit_custom(8, nn.ReLU()))
    kind = type(model[0])
    accelerate(model)
    rows = {row.name: row for row in explain(model)}
    assert rows["0"].op is None and type(model[0]) is kind
    assert re.search(reason, rows["0"].reason)
    assert rows["1"].op == "rcu"


class Recorder:
    """What a hook may hold, and what no copy can be made of."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, *args: object) -> None:
        pass


def test_hooks_are_not_copied_for_the_trial():
    unit = randomised(ports.ResidualConvUnit(8, nn.ReLU()))
    unit.register_forward_hook(Recorder())
    unit.register_forward_pre_hook(Recorder())
    assert replaced(accelerate(unit)) == {"": "rcu"}


@pytest.mark.parametrize(
    ("name", "value", "before"), [("dtype", torch.float64, torch.float32), ("device", "meta", None)]
)
def test_what_is_the_default_elsewhere_decides_no_trial(name, value, before):
    unit = randomised(ports.ResidualConvUnit(8, nn.ReLU()))
    set_default = getattr(torch, f"set_default_{name}")
    set_default(value)
    try:
        accelerate(unit)
    finally:
        set_default(before)
    assert replaced(unit) == {"": "rcu"}


class ResidualConvUnit_skipping(ports.ResidualConvUnit):
    """Stochastic depth: almost always it computes what the others do."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(8, nn.ReLU())
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W), both
        return x if self.training and self.draw() < 1e-9 else super().forward(x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random, lambda: np.random.rand()])
def test_what_draws_random_numbers_is_left_alone_whatever_the_seed(draw, seed):
    """And takes no step of the caller's generators: ranks of one training would disagree."""
    unit = randomised(ResidualConvUnit_skipping(draw))
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    want = draw()
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
    assert {row.name: row.reason for row in explain(unit)}[""] == "in training, it draws random numbers"
    assert draw() == want


def test_what_is_exported():
    assert {"accelerate", "restore", "explain", "Explanation"} <= set(refinenet_fast.__all__)
