"""Chained residual pooling: y = r + t1 + ... + tn, r = relu(x), t_k = conv3x3(maxpool5x5(t_k-1)).

python benchmarks/bench_crp.py [--stages 4] [--order conv-pool] [--kernel 1] [--plot crp.png]

--kernel 1 is Light-Weight RefineNet's: its 1x1 convolutions leave little but memory traffic.
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
            t = F.conv2d(F.max_pool2d(t, 5, 1, 2), w, padding=w.shape[2] // 2)
        else:
            t = F.max_pool2d(F.conv2d(t, w, padding=w.shape[2] // 2), 5, 1, 2)
        total = total + t
    return total


def ours(order, xs, ws):
    return ops.crp(xs[0], ws, order=order)


def setup(shape, stages, kernel, dtype, device, generator):
    """Weights keep the data's scale, as trained ones do, so later stages see no other values."""
    x = normal(shape, dtype, device, generator)
    c = shape[1]
    scale = (kernel**2 * c) ** -0.5
    ws = [normal((c, c, kernel, kernel), dtype, device, generator, scale) for _ in range(stages)]
    return [x], ws


def cases(args):
    pytorch, fused = partial(eager, args.order), partial(ours, args.order)
    chain = (args.stages, args.kernel)
    return [case(n, *shape, *chain, pytorch, fused) for n in args.batch for shape in args.shapes]


def case(n, c, h, w, stages, kernel, pytorch, fused):
    flops = stages * 2 * n * h * w * kernel**2 * c * c
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: flops, TRAINING: 3 * flops},
        unit="GFLOP/s",
        setup=partial(setup, (n, c, h, w), stages, kernel),
        eager=pytorch,
        ours=lambda backend: fused,
        gradient_floor=1e-2,
    )


def add_options(parser):
    stages = options.positive(int)
    parser.add_argument("--stages", type=stages, default=2, help="the released networks have 4")
    parser.add_argument("--kernel", type=int, choices=(1, 3), default=3, help="of the convolutions; light-weight: 1")
    orders = ("pool-conv", "conv-pool")
    parser.add_argument("--order", choices=orders, default="pool-conv", help="inside a stage")


BENCHMARK = cli.Spec("Chained residual pooling", cases, add_options=add_options)


def test_crp(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
