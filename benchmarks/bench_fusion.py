"""Multi-resolution fusion of two paths: y = conv3x3(high) + bilinear(conv3x3(low)).

python benchmarks/bench_fusion.py [--plot fusion.png]

A shape is that of the high path and of the result; the low path has half its height and width.
"""

import sys
from functools import partial

import torch.nn.functional as F

import cli
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import ops

# The three fusions of the network on a 512x512 image: its deepest block has one path only.
SHAPES = ((256, 128, 128), (256, 64, 64), (256, 32, 32))
LOW_CHANNELS = {(256, 32, 32): 512}  # the deepest block is 512 wide, the others 256


def eager(xs, ws):
    high, low = (F.conv2d(x, w, padding=1) for x, w in zip(xs, ws))
    return high + F.interpolate(low, high.shape[2:], mode="bilinear", align_corners=True)


def ours(xs, ws):
    return ops.fuse(xs, ws)


def setup(c, shapes, dtype, device, generator):
    """shapes: of each path's map, (N, C_i, H_i, W_i); c: channels of the result."""
    data = partial(normal, dtype=dtype, device=device, generator=generator)
    ws = [data((c, shape[1], 3, 3), scale=(9 * shape[1]) ** -0.5) for shape in shapes]
    return [data(shape) for shape in shapes], ws


def case(n, c, h, w):
    low = (n, LOW_CHANNELS.get((c, h, w), c), (h + 1) // 2, (w + 1) // 2)
    flops = 2 * n * 9 * c * (h * w * c + low[1] * low[2] * low[3])
    return Case(
        shape=(n, c, h, w),
        work={FORWARD: flops, TRAINING: 3 * flops},
        unit="GFLOP/s",
        setup=partial(setup, c, ((n, c, h, w), low)),
        eager=eager,
        ours=lambda backend: ours,
    )


def cases(args):
    return [case(n, *shape) for n in args.batch for shape in args.shapes]


BENCHMARK = cli.Spec("Multi-resolution fusion", cases, SHAPES)


def test_fusion(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
