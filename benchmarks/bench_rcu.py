"""Residual conv unit: y = x + conv3x3(relu(conv3x3(relu(x)) + b)).

python benchmarks/bench_rcu.py [--plot rcu.png]
"""

import sys
from functools import partial

import torch.nn.functional as F

import cli
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import ops


def eager(xs, ws):
    (x,), (w1, b1, w2) = xs, ws
    return x + F.conv2d(F.relu(F.conv2d(F.relu(x), w1, b1, padding=1)), w2, padding=1)


def ours(xs, ws):
    (x,), (w1, b1, w2) = xs, ws
    return ops.rcu(x, w1, b1, w2)


def setup(shape, dtype, device, generator):
    data = partial(normal, dtype=dtype, device=device, generator=generator)
    c = shape[1]
    scale = (9 * c) ** -0.5
    return [data(shape)], [data((c, c, 3, 3), scale=scale), data((c,)), data((c, c, 3, 3), scale=scale)]


def case(n, c, h, w):
    flops = 2 * 2 * n * h * w * 9 * c * c
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: flops, TRAINING: 3 * flops},
        unit="GFLOP/s",
        setup=partial(setup, (n, c, h, w)),
        eager=eager,
        ours=lambda backend: ours,
        gradient_floor=1e-2,
    )


def cases(args):
    return [case(n, *shape) for n in args.batch for shape in args.shapes]


BENCHMARK = cli.Spec("Residual conv unit", cases)


def test_rcu(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
