"""``torch.compile`` without graph breaks, forward and backward, and ``torch.export``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import refinenet_fast
from common import assert_same_bits, with_gradients
from refinenet_fast import ops
from refinenet_fast.testing import Call, Data, crp_call, fuse_call, rcu_call, relative_l2

OPS = ["rcu", "fuse", "crp"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def example(op: str, data, height: int = 6, width: int = 5, batch: int = 2) -> Call:
    shape = (batch, 3, height, width)
    if op == "fuse":
        small = (batch, 4, (height + 1) // 2, width // 2 + 1)
        return fuse_call([shape, small], data, [3, 1], 5, True, size=shape[2:])
    return crp_call(shape, data) if op == "crp" else rcu_call(shape, data, adds="1")


def function(op: str, **options):
    """The op as a user's code calls it, on the tensors of a call."""
    if op == "rcu":
        return lambda call, x, add, *rest: ops.rcu(x, *rest, add=add)
    if op == "fuse":
        return lambda call, a, b, *rest: ops.fuse([a, b], rest[:2], rest[2:], **options)
    return lambda call, x, *rest: ops.crp(x, rest[:2], rest[2:])


@pytest.mark.parametrize("op", OPS)
def test_fullgraph_forward_and_backward(place32, op):
    call, eager = example(op, place32.data()), function(op)
    with place32.forced():
        compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
        y, grads = with_gradients(compiled, call)
        want, want_grads = with_gradients(eager, call)
        assert_same_bits([y, *grads], [want, *want_grads])
        with torch.no_grad():
            assert_same_bits([compiled(call, *call.tensors)], [eager(call, *call.tensors)])


@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_all_sizes(place32, op):
    counter, eager = CompileCounterWithBackend("aot_eager"), function(op)  # sizes that are equal by chance are guarded
    compiled = torch.compile(eager, backend=counter, fullgraph=True, dynamic=True)
    with place32.forced():
        for height, width, batch in ((11, 17, 2), (13, 25, 7), (31, 15, 8)):
            call = example(op, place32.data(), height, width, batch)
            y, grads = with_gradients(compiled, call)
            want, want_grads = with_gradients(eager, call)
            assert_same_bits([y, *grads], [want, *want_grads])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_inductor(op):
    """Code around the op is fused by the compiler; the op is called as it is."""
    call, inner = example(op, Data()), function(op)

    def eager(call: Call, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.tanh(inner(call, torch.sin(x) + 0.5, *rest)) * 2

    y, grads = with_gradients(torch.compile(eager, fullgraph=True), call)
    want, want_grads = with_gradients(eager, call)
    for got, wanted in zip([y, *grads], [want, *want_grads], strict=True):
        assert relative_l2(got, wanted) < 1e-5


def test_a_compiled_function_follows_use_backend():
    call = crp_call((1, 3, 4, 5), Data())
    seen = []

    def spy(graph, inputs):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "refinenet_fast" in str(node.target))
        return graph

    compiled = torch.compile(function("crp"), backend=spy, fullgraph=True)
    names = [
        info.name for info in refinenet_fast.list_backends() if info.available and info.name not in ("triton", "cuda")
    ]
    for name in names:
        with refinenet_fast.use_backend(name):
            compiled(call, *call.tensors)
    assert seen == names


def test_an_unsuitable_forced_backend_is_an_error_in_compiled_code_too():
    call = crp_call((1, 3, 4, 5), Data())
    compiled = torch.compile(function("crp"), backend="eager", fullgraph=True)
    if torch.cuda.is_available():
        pytest.skip("needs a backend that cannot run")
    with refinenet_fast.use_backend("cuda"), pytest.raises(Exception, match=r"'cuda' is forced and cannot run this"):
        compiled(call, *call.tensors)


def test_autocast_within_compiled_code(place32):
    call, inner = example("crp", place32.data()), function("crp")
    kind = torch.device(place32.device).type

    def eager(call: Call, *tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16):
            return inner(call, *tensors)

    with place32.forced():
        y, grads = with_gradients(torch.compile(eager, backend="aot_eager", fullgraph=True), call)
        want, want_grads = with_gradients(eager, call)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
    assert_same_bits([y, *grads], [want, *want_grads])


class Path(nn.Module):
    """All three hot paths, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 3, 3) / 6) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        y = ops.rcu(x, w[0], None, w[1])
        y = ops.fuse([y, y[:, :, ::2, ::2]], [w[2], w[3]], size=y.shape[2:])
        return ops.crp(y, [w[4], w[5]])


def _own_nodes(program: torch.export.ExportedProgram) -> int:
    return sum("refinenet_fast" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """As ops; or, with ``reference`` forced, as the plain operations that ONNX knows."""
    model, x, other = Path().eval(), torch.randn(2, 4, 8, 10), torch.randn(2, 4, 12, 6)
    shapes = ({2: torch.export.Dim("half", min=3, max=64) * 2, 3: torch.export.Dim("side", min=3, max=64) * 2},)
    with torch.no_grad():
        with_ops = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
        with refinenet_fast.use_backend("reference"):
            plain = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
            wanted = {z: model(z) for z in (x, other)}
    assert _own_nodes(with_ops) == 3 and _own_nodes(plain) == 0
    for program in (with_ops, plain):
        for z, want in wanted.items():
            assert relative_l2(program.module()(z), want) < 1e-5
