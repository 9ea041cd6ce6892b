"""What only a GPU shows, of every GPU backend: graphs, streams, devices, compiled graphs, the same bits twice."""

from __future__ import annotations

import pytest
import torch

from refinenet_fast import RefineNetBlock, backends, testing, use_backend
from refinenet_fast.testing import Data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPE = (2, 64, 24, 40)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    reason = backends.get(request.param).unavailable()
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def data(request):
    return Data(request.param, "cuda")


def test_every_kernel_and_hot_path_is_right(backend, data):
    with testing.exact_float32():
        for shape in (*testing.ODD, *testing.USUAL):
            rows = [testing.check_kernels(backends.get(backend), shape, data)]
            rows += [testing.check_call(call, backend) for call in testing.some_calls(shape, data)]
            for op, direction, error, limit in (row for found in rows for row in found):
                assert error <= limit, f"{op} {direction} {shape}: error {error:.3g}, limit {limit:.3g}"


def test_tf32_where_cudnn_would_use_it(backend):
    from triton_cases import tf32_errors

    for shape in ((2, 64, 31, 47), (1, 40, 3, 20)):
        error, expected = tf32_errors(backends.get(backend), shape, 24, "cuda")
        assert expected > 1e-5 and error <= 1.5 * expected


def test_the_same_bits_twice(backend, data):
    for call in testing.some_calls(SHAPE, data):
        y, saved = call.train(backend)
        again, saved_again = call.train(backend)
        assert torch.equal(y, again)
        gy = torch.randn_like(y)
        for a, b in zip(call.gradients(gy, saved, backend), call.gradients(gy, saved_again, backend), strict=True):
            assert torch.equal(a, b)


def test_in_a_cuda_graph(backend, data):
    """Captured once, replayed on other data: what plain calls give."""
    for call in testing.some_calls(SHAPE, data):
        call.infer(backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gy = torch.randn_like(call.infer(backend))
        call.gradients(gy, call.train(backend)[1], backend)
        with torch.cuda.graph(graph):
            y, saved = call.train(backend)
            gradients = call.gradients(gy, saved, backend)
        call.tensors[0].mul_(-2)
        graph.replay()
        want, saved = call.train(backend)
        assert torch.equal(y, want)
        assert all(map(torch.equal, gradients, call.gradients(gy, saved, backend)))


def test_on_the_current_stream(backend, data):
    call = testing.crp_call(SHAPE, data)
    want, saved = call.train(backend)
    gy, stream = torch.randn_like(want), torch.cuda.Stream()
    gradients = call.gradients(gy, saved, backend)
    x = call.tensors[0].clone()
    call.tensors[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for this stream reads zeros
        call.tensors[0].copy_(x)
        y, saved = call.train(backend)
        again = call.gradients(gy, saved, backend)
    stream.synchronize()
    assert torch.equal(y, want) and all(map(torch.equal, again, gradients))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_tensors_device_whatever_the_current_one_is(backend):
    call = testing.rcu_call(SHAPE, Data(torch.float16, "cuda:1"))
    want = testing.rcu_call(SHAPE, Data(torch.float16, "cuda:0")).infer(backend)
    with torch.cuda.device(0):
        assert torch.equal(call.infer(backend).to("cuda:0"), want)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_and_under_autocast(backend, mode):
    torch.manual_seed(0)
    block = RefineNetBlock([32, 48], 32, crp_stages=4).cuda()
    maps = [torch.randn(2, 32, 24, 40, device="cuda"), torch.randn(2, 48, 12, 20, device="cuda")]
    compiled = torch.compile(block, mode=mode, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        want = block(maps)
        for _ in range(3):
            y = compiled(maps).clone()
        assert y.dtype == torch.bfloat16 and testing.relative_l2(y, want) <= 2e-2
        y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_more_elements_than_32_bits_count(backend):
    """2^31 + some elements: the last image is as it would be alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GB of free memory")
    data = Data(torch.bfloat16, "cuda")
    x = torch.empty(257, 256, 256, 128, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last)
    x.zero_()[-1] = data(1, 256, 256, 128)[0]
    kernels, weight = backends.get(backend), data.weight(16, 256, 3, salt=1)
    alone = x[-1:].clone(memory_format=torch.channels_last)
    assert torch.equal(kernels.conv3x3(x, weight)[-1:], kernels.conv3x3(alone, weight))
    assert torch.equal(kernels.maxpool5(x)[0][-1:], kernels.maxpool5(alone)[0])
    point = data.weight(16, 256, 1, salt=2)
    way_in = backends.WayIn(pool=True)
    assert torch.equal(
        kernels.conv3x3(x, point, way_in, pack=True)[-1:], kernels.conv3x3(alone, point, way_in, pack=True)
    )
    assert torch.equal(
        kernels.bilinear_backward(x, (99, 70), True)[-1:], kernels.bilinear_backward(alone, (99, 70), True)
    )
    gy = torch.zeros(257, 16, 256, 128, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    gy[-1] = data(1, 16, 256, 128, salt=3)[0]
    wants = kernels.conv3x3_weight_grad(alone, gy[-1:], weight)
    assert testing.relative_l2(kernels.conv3x3_weight_grad(x, gy, weight), wants) <= 1e-2
