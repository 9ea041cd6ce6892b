"""Chained residual pooling: y = r + t1 + ... + tn, r = relu(x), t_k = conv3x3(maxpool5x5(t_k-1)).

python benchmarks/bench_crp.py [--stages 4] [--order conv-pool] [--plot crp.png]
"""

import sys
from functools import partial

import torch.nn.functional as F

import cli
import options
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import ops


def eager(order, xs, ws):
    total = t = F.relu(xs[0])
    for w in ws:
        if order == "pool-conv":
            t = F.conv2d(F.max_pool2d(t, 5, 1, 2), w, padding=1)
        else:
            t = F.max_pool2d(F.conv2d(t, w, padding=1), 5, 1, 2)
        total = total + t
    return total


def ours(order, xs, ws):
    return ops.crp(xs[0], ws, order=order)


def setup(shape, stages, dtype, device, generator):
    """Weights keep the data's scale, as trained ones do, so later stages see no other values."""
    x = normal(shape, dtype, device, generator)
    c = shape[1]
    ws = [normal((c, c, 3, 3), dtype, device, generator, (9 * c) ** -0.5) for _ in range(stages)]
    return [x], ws


def cases(args):
    pytorch, fused = partial(eager, args.order), partial(ours, args.order)
    return [case(n, *shape, args.stages, pytorch, fused) for n in args.batch for shape in args.shapes]


def case(n, c, h, w, stages, pytorch, fused):
    flops = stages * 2 * n * h * w * 9 * c * c
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: flops, TRAINING: 3 * flops},
        unit="GFLOP/s",
        setup=partial(setup, (n, c, h, w), stages),
        eager=pytorch,
        ours=lambda backend: fused,
        gradient_floor=1e-2,
    )


def add_options(parser):
    stages = options.positive(int)
    parser.add_argument("--stages", type=stages, default=2, help="the released networks have 4")
    orders = ("pool-conv", "conv-pool")
    parser.add_argument("--order", choices=orders, default="pool-conv", help="inside a stage")


BENCHMARK = cli.Spec("Chained residual pooling", cases, add_options=add_options)


def test_crp(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
