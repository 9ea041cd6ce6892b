"""Whole networks, images to logits, against the same network in plain PyTorch.

python benchmarks/bench_model.py --networks refinenet101 --shapes 3x512 --directions forward --fold

Batch norm is frozen and there is no dropout, so that contenders compute the same. --fold folds it into the convolutions
for all of them, as the peers' exporters and torch.compile's freezing do by themselves.
"""

import copy
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call

import cli
import options
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import (
    ChainedResidualPooling,
    MultiResolutionFusion,
    RefineNet,
    ResidualConvUnit,
)
from refinenet_fast.blocks import Convolution

NETWORKS = {
    "refinenet50": {"trunk": "resnet50", "crp_stages": 4},
    "refinenet101": {"trunk": "resnet101", "crp_stages": 4},
    "refinenet152": {"trunk": "resnet152", "crp_stages": 4},
    "light-weight50": {"trunk": "resnet50", "crp_stages": 4, "light_weight": True},
    "light-weight101": {"trunk": "resnet101", "crp_stages": 4, "light_weight": True},
    "light-weight152": {"trunk": "resnet152", "crp_stages": 4, "light_weight": True},
    "light-weight-mobilenet": {"trunk": "mobilenetv2_100", "crp_stages": 4, "light_weight": True},
    "refinenet50-single": {"trunk": "resnet50", "cascades": 1},
    "refinenet50-2-cascaded": {"trunk": "resnet50", "cascades": 2},
    "refinenet50-2-scale": {"trunk": "resnet50", "scales": (1.2, 0.6)},
    "tiny": {"trunk": "resnet18", "width": 16, "deep_width": 16},
}
CLASSES = 21

# ---- the network in plain PyTorch: the same modules with other forwards ----------------------


class PlainUnit(ResidualConvUnit):
    def forward(self, x):
        assert self.skip == "raw"
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class PlainFusion(MultiResolutionFusion):
    def forward(self, xs):
        size = [max(x.shape[d] for x in xs) for d in (2, 3)]
        y = 0
        for conv, x in zip(self.convs, xs):
            t = conv(x)
            if list(t.shape[2:]) != size:
                t = F.interpolate(t, size, mode="bilinear", align_corners=self.align_corners)
            y = y + t
        return y


class PlainPooling(ChainedResidualPooling):
    def forward(self, x):
        assert self.order == "pool-conv"
        t = y = F.relu(x)
        for conv in self.convs:
            t = conv(F.max_pool2d(t, 5, stride=1, padding=2))
            y = y + t
        return y


class PlainNetwork(RefineNet):
    def _resize(self, logits, images):
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


PLAIN = {
    Convolution: torch.nn.Conv2d,
    ResidualConvUnit: PlainUnit,
    MultiResolutionFusion: PlainFusion,
    ChainedResidualPooling: PlainPooling,
    RefineNet: PlainNetwork,
}


def plain(network):
    """A copy whose hot paths are PyTorch's own operations; names and parameters are the same."""
    network = copy.deepcopy(network)
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


# ---- the cases -------------------------------------------------------------------------------


class Network:
    """Builds a network when the first case needs it, then serves it by parameters."""

    def __init__(self, name, fold):
        self.name = name
        self.fold = fold
        self.built = {}

    def __call__(self, kind, dtype, device):
        key = (kind, dtype, device)
        if key not in self.built:
            with torch.inference_mode(False):  # it will be trained as well
                self.built[key] = self._build(kind, dtype, device)
        return self.built[key]

    def _build(self, kind, dtype, device):
        if kind == "plain":
            return plain(self("ours", dtype, device))
        torch.manual_seed(0)
        # Weights that keep the data's scale, as trained ones do; the paper's start at almost none.
        network = RefineNet(CLASSES, freeze_bn=True, dropout=0.0, init="kaiming", **NETWORKS[self.name])
        for unit in network.blocks.modules():
            if isinstance(unit, ResidualConvUnit):
                torch.nn.init.normal_(unit.conv2.weight, std=(9 * unit.conv2.in_channels) ** -0.5)
        network = network.eval()
        network = network.fold_batch_norm() if self.fold else network
        return network.to(device, dtype, memory_format=torch.channels_last)

    def trainable(self, dtype, device):
        return {n: p for n, p in self("ours", dtype, device).named_parameters() if p.requires_grad}

    def run(self, kind, xs, ws):
        (x,) = xs
        network = self(kind, x.dtype, x.device)
        names = self.trainable(x.dtype, x.device)
        return functional_call(network, dict(zip(names, ws)), (x,))


def setup(network, shape, dtype, device, generator):
    ws = [p.detach() for p in network.trainable(dtype, device).values()]
    return [normal(shape, dtype, device, generator)], ws


def case(name, fold, n, c, h, w):
    network = Network(name, fold)
    return Case(
        label=f"{name} folded" if fold else name,
        shape=(n, c, h, w),
        work={FORWARD: n, TRAINING: n},
        unit="images/s",
        setup=partial(setup, network, (n, c, h, w)),
        eager=partial(network.run, "plain"),
        ours=lambda backend: partial(network.run, "ours"),
        gradient_floor=5e-2,
        patience=10,
    )


def cases(args):
    names = args.networks or (["tiny"] if args.quick else ["refinenet101", "light-weight50"])
    return [case(name, args.fold, n, *shape) for name in names for n in args.batch for shape in args.shapes]


def add_options(parser):
    parser.add_argument("--networks", type=options.names_from(NETWORKS), help="a,b,c")
    parser.add_argument("--fold", action="store_true", help="batch norm folded into the convolutions")


BENCHMARK = cli.Spec("RefineNet", cases, shapes=((3, 256, 256),), quick=((3, 64, 48),), add_options=add_options)


def test_model(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
