"""The CPU's own convolutions: where they are chosen, sizes and steps for which they would not be; packed weights."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from common import assert_same_bits, convolving, run_python, running_on
from refinenet_fast import _native, testing
from refinenet_fast.backends import WayIn, WayOut, engine, get
from refinenet_fast.backends.packed import PackedWeights
from refinenet_fast.backends.table import lookup
from refinenet_fast.layout import nhwc
from refinenet_fast.testing import Data, compare, conv, relative_l2

if _native._C is None:
    pytest.skip(f"{_native.missing}", allow_module_level=True)

STEPS = ("bias", "relu", "select", "add", "add_relu", "upsample")
DTYPES = [torch.float32, torch.bfloat16]


def hold(rows):
    for op, direction, error, limit in rows:
        assert error <= limit, f"{op} {direction}: error {error:.3g}, limit {limit:.3g}"


@pytest.fixture
def always():
    """Every convolution, however small."""
    with convolving("engine"):
        yield


@pytest.fixture(params=list(_native._C.cpu_isas()))
def isa(request):
    with running_on(request.param, torch.get_num_threads()):
        yield request.param


@pytest.fixture
def no_tables(monkeypatch):
    """The rule alone decides, as on processors that have no table."""
    monkeypatch.setattr(engine, "lookup", lambda question: None)


@pytest.mark.parametrize("channels, side", [(256, 128), (256, 64), (256, 32), (512, 32), (512, 16), (64, 16)])
def test_it_is_chosen_at_refinenets_shapes(channels, side):
    x, weight = torch.empty(1, channels, side, side), torch.empty(channels, channels, 3, 3)
    assert engine.pays(x, weight)
    asked = engine.question(x, weight)._replace(kernel="cpu weight_grad")
    measured_otherwise = side == 16 and lookup(asked) == "vendor"  # of the smallest maps a table may say so
    assert engine.gradient_pays(x, weight) is not measured_otherwise
    assert not engine.pays(x.half(), weight) and not engine.pays(x.double(), weight)
    assert not engine.pays(x[:0], weight) and not engine.gradient_pays(x[:0], weight)


def test_the_rule_without_tables(no_tables):
    x, weight = torch.empty(1, 64, 16, 16), torch.empty(64, 64, 3, 3)
    assert engine.pays(x, weight) and engine.gradient_pays(x, weight)
    assert not engine.pays(x, weight[:, :, 1:2, 1:2])  # 1x1
    assert not engine.pays(x[:, :8], weight[:, :8])  # few channels
    assert not engine.pays(x[:, :, :6, :6], weight)  # few pixels
    assert engine.pays(x[:, :, :8, :8], weight) and not engine.gradient_pays(x[:, :, :8, :8], weight)
    assert not engine.pays(torch.empty(1, 64, 1, 999), weight)  # tiles of which a quarter is used


@pytest.mark.parametrize(
    ("most", "multiplies"),
    [(None, True), ("all", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_BF16", False), ("AVX10_1_512", False)],
)
def test_onednn_may_be_kept_from_multiplying_bfloat16(most, multiplies, monkeypatch):
    if most is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert engine._multiplies_bfloat16.__wrapped__() is (multiplies and amx)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_bfloat16_is_the_vendors_where_the_processor_multiplies_it(no_tables, amx, onednn, monkeypatch):
    monkeypatch.setattr(engine, "_multiplies_bfloat16", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn or amx)
    x, weight = torch.empty(1, 256, 64, 64, dtype=torch.bfloat16), torch.empty(256, 256, 3, 3)
    assert engine.pays(x, weight) is not amx and engine.gradient_pays(x, weight) is not amx
    small, pointwise = x[:, :, :4, :4], weight[:, :, 1:2, 1:2]
    slow = not (onednn or amx)  # PyTorch's own bfloat16, in vectors of float32
    assert engine.pays(small, weight) is slow and engine.gradient_pays(small, weight) is slow
    assert engine.pays(x, pointwise) is slow and not engine.pays(x[:, :, :1, :1], weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*testing.ODD, (1, 1, 4, 5), (2, 9, 8, 3), (1, 70, 5, 6), (1, 40, 21, 22)], ids=str)
def test_any_size(always, isa, shape, dtype):
    hold(testing.check_kernels(get("cpu"), shape, Data(dtype)))


def test_a_weight_gradient_of_more_tiles_than_are_transformed_at_once():
    """1600 tiles of 256 channels: a chunk and the rest; the bias's gradient with it, the same bits on one thread."""
    data = Data()
    x, gy, weight, bias = data(1, 256, 157, 159), data(1, 24, 157, 159, salt=1), data.weight(24, 256, 3, 2), data(24)
    assert engine.gradient_pays(x, weight)
    grads = engine.weight_gradient(x, gy, weight, bias, relu_in=True)
    error, limit = compare(grads, lambda w, b: conv(x.to(w.dtype).relu(), w, b), [weight, bias], gy, winograd=True)
    assert error <= limit
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = engine.weight_gradient(x, gy, weight, bias, relu_in=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


# More channels than are multiplied at once (256), on few tiles and on more than one block of them (96).
DEEP = [(1, 300, 16, 17), (1, 530, 41, 42)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("shape", DEEP, ids=str)
def test_many_channels(always, isa, shape, kernel, dtype):
    data, (n, c, h, w), k = Data(dtype), shape, 35
    x, weight, gy = data(*shape), data.weight(k, c, kernel, salt=1), data(n, k, h, w, salt=2)
    hold(testing.check_conv3x3(get("cpu"), x, weight, gy, WayIn(relu=True), WayOut(), pack=True))


@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("shape", [(2, 19, 9, 7), *DEEP[:1]], ids=str)
def test_bfloat16_is_float32_rounded_once(always, isa, shape, kernel):
    data, (n, c, h, w), k = Data(torch.bfloat16), shape, 21
    x, weight, bias = data(*shape), data.weight(k, c, kernel, salt=1), data(k, salt=2)
    maps = [data(n, k, h, w, salt=s) for s in (3, 4, 5)]
    low = data(n, k, 3, 4, salt=6)

    def convolved(dtype):
        select, add, add_relu = (t.to(dtype) for t in maps)
        way_out = WayOut(bias.to(dtype), True, select, (add,), (add_relu,), low.to(dtype))
        return get("cpu").conv3x3(x.to(dtype), weight, WayIn(relu=True, pool=True), way_out)

    assert torch.equal(convolved(torch.bfloat16), convolved(torch.float32).bfloat16())


def test_no_more_channels_than_keep_the_error_small():
    x, weight = torch.empty(1, 8192, 12, 12), torch.empty(16, 8192, 3, 3)
    assert engine.pays(x, weight)
    assert not engine.pays(torch.empty(1, 8193, 12, 12), torch.empty(16, 8193, 3, 3))


def test_what_it_has_not_is_the_vendors():
    x = torch.randn(1, 4, 9, 9)
    assert not engine.pays(x, torch.empty(8, 4, 5, 5)) and not engine.pays(x, torch.empty(0, 4, 3, 3))
    assert get("cpu").conv3x3(x, torch.randn(8, 4, 5, 5)).shape == (1, 8, 9, 9)


@pytest.mark.parametrize("pack", [True, False])
def test_onednn_performs_whatever_steps_it_is_handed(pack):
    """A table that is read anew between two questions may have promised the steps of another convolution."""
    data = Data()
    x, weight = data(1, 9, 8, 7), data.weight(21, 9, 3, salt=1)
    maps = [data(1, 21, 8, 7, salt=s) for s in (3, 4, 5)]
    way_in, way_out = WayIn(True, True), WayOut(data(21), True, maps[0], (maps[1],), (maps[2],), data(1, 21, 3, 4))
    y = get("cpu")._onednn(x, weight, way_in, way_out, pack)
    torch.testing.assert_close(y, testing.convolution(x, weight, way_in, way_out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 19, 5, 4), (1, 9, 13, 10)], ids=str)
def test_the_pool_on_the_way_in(always, isa, shape, kernel, relu, dtype):
    data, (n, c, h, w) = Data(dtype), shape
    tensors = data(*shape), data.weight(21, c, kernel, salt=1), data(n, 21, h, w, salt=2)
    hold(testing.check_conv3x3(get("cpu"), *tensors, WayIn(relu=relu, pool=True), WayOut(), pack=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_spreads_over_its_pool_and_the_tiles_it_touches(always, isa, dtype):
    """And -inf outside of the image over nothing."""
    x = torch.ones(1, 9, 40, 40, dtype=dtype)
    x[0, 4, 20, 20] = torch.nan
    y = get("cpu").conv3x3(x, torch.ones(3, 9, 3, 3), WayIn(pool=True), pack=True)
    must, may = torch.zeros(40, 40, dtype=torch.bool), torch.zeros(40, 40, dtype=torch.bool)
    must[17:24, 17:24], may[16:24, 16:24] = True, True  # pooled 18 ... 22, then its neighbours; whole tiles of 4
    assert y.isnan()[0][:, must].all() and not y.isnan()[0][:, ~may].any() and y.isinf().sum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("first, second", list(itertools.combinations_with_replacement(STEPS, 2)))
def test_each_pair_of_steps(always, isa, first, second, kernel, dtype):
    data, (n, c, h, w), k, steps = Data(dtype), (2, 5, 6, 7), 19, {first, second}
    x, weight, gy = data(n, c, h, w), data.weight(k, c, kernel, salt=1), data(n, k, h, w, salt=8)
    adds = [data(n, k, h, w, salt=s) for s in (4, 5, 6)]
    way_out = WayOut(
        bias=data(k, salt=2) if "bias" in steps else None,
        relu="relu" in steps,
        select=data(n, k, h, w, salt=3) if "select" in steps else None,
        add=tuple(adds[:2]) if "add" in steps else (),
        add_relu=tuple(adds[2:]) if "add_relu" in steps else (),
        upsample=data(n, k, 3, 5, salt=7) if "upsample" in steps else None,
        align_corners="add" in steps,
    )
    assert get("cpu").fuses(x, weight, pack=True) is engine.FUSES
    hold(testing.check_conv3x3(get("cpu"), x, weight, gy, WayIn(), way_out, pack=True))


def test_more_blocks_panels_and_threads_change_no_bit(always, isa):
    x, weight = nhwc(Data()(2, 48, 37, 41)), Data().weight(70, 48, 3, salt=1)
    kernels, threads = get("cpu"), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append([kernels.conv3x3(x, weight, WayIn(relu=True)), kernels.conv3x3_input_grad(x, weight[:48])])
    finally:
        torch.set_num_threads(threads)
    alone = [kernels.conv3x3(x[:1], weight, WayIn(relu=True)), kernels.conv3x3_input_grad(x[:1], weight[:48])]
    assert_same_bits([t[:1] for t in found[0]], alone)
    for other in found[1:]:
        assert_same_bits(other, found[0])


DEFAULTS = """
import torch
from refinenet_fast import ops

x, w = torch.randn(1, 48, 40, 40), torch.randn(48, 48, 3, 3) / 21
for default in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
    torch.set_default_dtype(default)
    for _ in range(8):
        y = ops.crp(x, [w, w * (1 + torch.rand(()).float())]).sum()
        leaf = x.clone().requires_grad_()
        ops.crp(leaf, [w, w]).sum().backward()
    assert y.isfinite() and leaf.grad.isfinite().all()
print("done")
"""


def test_the_default_dtype_does_not_matter():
    done = run_python(DEFAULTS)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"weight": (32, 24, 3, 3)}, ValueError, r"weight: expected \(32, 32, 3, 3\) on cpu, got \(32, 24, 3, 3\)"),
        ({"bias": (8,)}, ValueError, r"bias: expected \(32,\) on cpu, got \(8,\)"),
        ({"select": (1, 32, 1, 1)}, ValueError, r"select: expected \(1, 32, 16, 16\) torch.float32"),
        ({"add": (1, 32, 16, 15)}, ValueError, r"add: expected \(1, 32, 16, 16\) torch.float32"),
        ({"add_relu": (1, 31, 16, 16)}, ValueError, r"add_relu: expected \(1, 32, 16, 16\) torch.float32"),
        ({"add": torch.float64}, ValueError, r"add: .*got \(1, 32, 16, 16\) torch.float64"),
    ],
)
def test_what_does_not_go_together_is_refused(change, error, said):
    shapes = {"weight": (32, 32, 3, 3), "bias": (32,), "select": (1, 32, 16, 16), "add": (1, 32, 16, 16)}
    shapes["add_relu"] = shapes["add"]
    tensors = {
        name: torch.zeros(change[name] if isinstance(change.get(name), tuple) else s) for name, s in shapes.items()
    }
    for name, dtype in change.items():
        tensors[name] = tensors[name].to(dtype) if isinstance(dtype, torch.dtype) else tensors[name]
    way_out = WayOut(tensors["bias"], True, tensors["select"], (tensors["add"],), (tensors["add_relu"],))
    with pytest.raises(error, match=said):
        get("cpu").conv3x3(torch.zeros(1, 32, 16, 16), tensors["weight"], way_out=way_out, pack=True)


# -- the cache of packed weights ---------------------------------------------------------------------------------------


def test_packed_weights_are_found_again_and_leave_in_their_order():
    cache, packed = PackedWeights(capacity=3 * 4 * 9), []

    def get_packed(value: float, layout: str = "a") -> torch.Tensor:
        weight = torch.full((1, 1, 3, 3), value)
        return cache.get(weight, torch.float32, layout, lambda w: packed.append((value, layout)) or w.clone())

    first = get_packed(1)
    assert get_packed(1) is first and cache.bytes == 36
    get_packed(1, "b")
    get_packed(2)
    get_packed(1)  # used again: the oldest is now layout b
    get_packed(3)
    assert cache.bytes == 108 and packed == [(1, "a"), (1, "b"), (2, "a"), (3, "a")]
    get_packed(1), get_packed(1, "b")
    assert packed[4:] == [(1, "b")] and cache.bytes == 108


def test_what_is_larger_than_the_cache_pushes_nothing_out():
    cache = PackedWeights(capacity=100)
    small, large = torch.zeros(1, 1, 3, 3), torch.zeros(2, 2, 3, 3)
    kept = cache.get(small, torch.float32, "", torch.clone)
    assert cache.get(large, torch.float32, "", torch.clone) is not cache.get(large, torch.float32, "", torch.clone)
    assert cache.get(small, torch.float32, "", torch.clone) is kept and cache.bytes == 36


def test_the_environment_sets_the_capacity():
    code = "from refinenet_fast.backends import get; print(get('cpu').packed.capacity)"
    assert run_python(code).stdout.strip() == str(2048 << 20)
    assert run_python(code, REFINENET_FAST_PACKED_MB="7").stdout.strip() == str(7 << 20)
    assert "REFINENET_FAST_PACKED_MB: expected a whole" in run_python(code, REFINENET_FAST_PACKED_MB="-1").stderr


@pytest.mark.parametrize("side", [3, 1])
@pytest.mark.parametrize("pool", [False, True])
def test_large_outputs(always, isa, side, pool):
    """Beyond 8 MB they may go past the caches, and the pool of such a map may be apart."""
    generator = torch.Generator().manual_seed(0)
    x, add = (nhwc(torch.randn(1, 64, 190, 190, generator=generator)) for _ in range(2))
    weight = torch.randn(64, 64, side, side, generator=generator) / 24
    y = get("cpu").conv3x3(x, weight, WayIn(pool=pool), WayOut(add=(add,)))
    taken = F.max_pool2d(x, 5, 1, 2) if pool else x
    assert relative_l2(y, F.conv2d(taken.double(), weight.double(), padding=side // 2) + add) < 1e-6
    with running_on(isa, 1):
        assert torch.equal(y, get("cpu").conv3x3(x, weight, WayIn(pool=pool), WayOut(add=(add,))))
