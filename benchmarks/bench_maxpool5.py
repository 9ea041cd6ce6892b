"""The kernel `maxpool5`, a 5x5 max pool of stride 1, against F.max_pool2d.

python benchmarks/bench_maxpool5.py

Bytes count each input read once and each output written once; neither PyTorch's indices nor our
argmax is an output that anybody asked for, so both cost bandwidth without counting.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F

import cli
from harness import FORWARD, TRAINING, Case, normal
from options import DTYPES
from refinenet_fast import backends


def eager(xs, ws):
    return F.max_pool2d(xs[0], 5, 1, 2)


def ours(backend):
    kernels = backends.get(backend)

    class MaxPool5(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y, argmax = kernels.maxpool5(x, argmax=True)
            ctx.save_for_backward(argmax)
            return y

        @staticmethod
        def backward(ctx, gy):
            return kernels.maxpool5_backward(gy, *ctx.saved_tensors)

    def function(xs, ws):
        return MaxPool5.apply(*xs) if torch.is_grad_enabled() else kernels.maxpool5(*xs)[0]

    return function


def setup(shape, dtype, device, generator):
    return [normal(shape, dtype, device, generator)], []


def case(n, c, h, w, dtype):
    size = n * c * h * w * DTYPES[dtype].itemsize
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: 2 * size, TRAINING: 4 * size},
        unit="GB/s",
        setup=partial(setup, (n, c, h, w)),
        eager=eager,
        ours=ours,
    )


def cases(args):
    return [case(n, *shape, args.dtype) for n in args.batch for shape in args.shapes]


BENCHMARK = cli.Spec("5×5 max pool", cases)


def test_maxpool5(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
