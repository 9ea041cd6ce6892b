"""The kernel `bilinear`, upsample-and-add, against F.interpolate followed by an addition.

python benchmarks/bench_bilinear.py

A shape is that of the larger map and of the result; the smaller map has half its height and
width. Bytes count each input read once and each output written once.
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
    high, low = xs
    return high + F.interpolate(low, high.shape[2:], mode="bilinear", align_corners=True)


def ours(backend):
    kernels = backends.get(backend)

    class UpsampleAdd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, high, low):
            ctx.size = tuple(low.shape[2:])
            return kernels.bilinear(low, tuple(high.shape[2:]), True, add=high)

        @staticmethod
        def backward(ctx, gy):
            return gy, kernels.bilinear_backward(gy, ctx.size, True)

    return lambda xs, ws: UpsampleAdd.apply(*xs)


def setup(shapes, dtype, device, generator):
    return [normal(shape, dtype, device, generator) for shape in shapes], []


def case(n, c, h, w, dtype):
    high, low = (n, c, h, w), (n, c, (h + 1) // 2, (w + 1) // 2)
    large, small = (n * c * s[2] * s[3] * DTYPES[dtype].itemsize for s in (high, low))
    forward = small + 2 * large
    return Case(
        shape=(n, c, h, w),
        # Backward reads the gradient and writes the small map's; the large map's is the same.
        work={FORWARD: forward, TRAINING: forward + large + small},
        unit="GB/s",
        setup=partial(setup, (high, low)),
        eager=eager,
        ours=ours,
    )


def cases(args):
    return [case(n, *shape, args.dtype) for n in args.batch for shape in args.shapes]


BENCHMARK = cli.Spec("Bilinear upsample-and-add", cases)


def test_bilinear(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
