"""The kernel `conv3x3` alone, with a bias, against F.conv2d at RefineNet's shapes.

python benchmarks/bench_conv3x3.py
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

import cli
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import backends
from refinenet_fast.backends import WayOut


def eager(xs, ws):
    return F.conv2d(xs[0], *ws, padding=1)


def ours(backend):
    kernels = backends.get(backend)

    class Conv3x3(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight, bias)
            return kernels.conv3x3(x, weight, way_out=WayOut(bias=bias))

        @staticmethod
        def backward(ctx, gy):
            x, weight, bias = ctx.saved_tensors
            gw, gb = kernels.conv3x3_weight_grad(x, gy, weight), kernels.bias_grad(gy, bias)
            return kernels.conv3x3_input_grad(gy, weight), gw, gb

    def run(xs, ws):
        if torch.is_grad_enabled():
            return Conv3x3.apply(*xs, *ws)
        return kernels.conv3x3(xs[0], ws[0], way_out=WayOut(bias=ws[1]), pack=True)

    return run


def setup(shape, dtype, device, generator):
    c = shape[1]
    weight = normal((c, c, 3, 3), dtype, device, generator, (9 * c) ** -0.5)
    return [normal(shape, dtype, device, generator)], [weight, normal((c,), dtype, device, generator)]


def case(n, c, h, w):
    flops = 2 * 9 * n * c * c * h * w
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: flops, TRAINING: 3 * flops},
        unit="GFLOP/s",
        setup=partial(setup, (n, c, h, w)),
        eager=eager,
        ours=ours,
    )


def cases(args):
    return [case(n, *shape) for n in args.batch for shape in args.shapes]


BENCHMARK = cli.Spec("3x3 convolution", cases)


def test_conv3x3(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
