"""Depth and segmentation networks of other libraries, before and after `refinenet_fast.accelerate`.

python benchmarks/bench_accelerate.py --families depth-anything --widths S,L --whole --json accelerate.json

Built from their configurations with random weights (extra `bench`). What is timed is the decoder, neck and head, on the
maps of one run; with --whole the network as well. Shapes are those of the image.
"""

import copy
import functools
import gc
import sys
from functools import partial

import torch
from torch.func import functional_call

import cli
import depth_models
import options
from harness import FORWARD, TRAINING, Case, normal
from refinenet_fast import accelerate

WIDTHS = ("tiny", *depth_models.SIZES)


class Subject:
    """A family's decoder, or whole network, as it is and accelerated.

    The weights are in memory once: the modules hold none, and are called with those of the case. They are built when
    the first case needs them, after those of the subject before have been freed.
    """

    held = None  # the subject whose weights are in memory

    def __init__(self, family, width, side, whole):
        self.family, self.width, self.side, self.whole = family, width, side, whole
        self.built = {}

    def hold(self):
        if Subject.held is not self:
            if Subject.held is not None:
                Subject.held.release()
            Subject.held = self

    def release(self):
        self.built.clear()
        for cached in ("original", "names"):
            self.__dict__.pop(cached, None)
        torch._dynamo.reset()  # what was compiled has constants of the weights
        gc.collect()

    @functools.cached_property
    def original(self):
        """The module in float32 on the CPU, and what it is given: an image, or maps or tokens of one run."""
        with torch.inference_mode(False):
            widths = {"tiny": depth_models.TINY, **self.family.widths}[self.width]
            network = depth_models.randomise(self.family.build(widths)).eval()
            network.to(memory_format=torch.channels_last)
            image = normal((1, 3, self.side, self.side), torch.float32, "cpu", torch.Generator().manual_seed(0))
            if self.whole:
                return network, [image]
            decoder = depth_models.Decoder(network, self.family.decoder, image)
            return decoder, decoder.inputs

    @functools.cached_property
    def names(self):
        """Of the parameters that take part in the result, but an attention's key bias: softmax takes it away again, and
        its gradient is nothing but rounding.
        """
        module, inputs = self.original
        names, parameters = zip(*module.named_parameters())
        with torch.inference_mode(False):
            y = result(module(*(x.clone() for x in inputs)))
            grads = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
        keys = ("key.bias", "k_proj.bias")
        return [name for name, grad in zip(names, grads) if grad is not None and not name.endswith(keys)]

    def setup(self, dtype, device, generator):
        self.hold()
        module, inputs = self.original
        parameters = dict(module.named_parameters())
        xs = [x.detach().clone().to(device, dtype) for x in inputs]
        return xs, [parameters[name].detach().to(device, dtype) for name in self.names]

    def module(self, ours, dtype, device):
        """Without the case's weights: on the meta device. A network computes with others too, for nothing."""
        key = ours, dtype, device
        if key not in self.built:
            with torch.inference_mode(False):
                parameters = dict(self.original[0].named_parameters())
                others = {
                    name: p.detach().to(device, dtype) for name, p in parameters.items() if name not in self.names
                }
                hollow = {name: torch.empty_like(parameters[name], dtype=dtype, device="meta") for name in self.names}
                new = {id(parameters[name]): torch.nn.Parameter(t) for name, t in (others | hollow).items()}
                module = copy.deepcopy(self.original[0], new)
                for part in module.modules():
                    for name, buffer in part.named_buffers(recurse=False):
                        kept = dtype if buffer.is_floating_point() else buffer.dtype
                        setattr(part, name, buffer.to(device, kept))
                self.built[key] = accelerate(module) if ours else module
        return self.built[key]

    def run(self, ours, xs, ws):
        module = self.module(ours, xs[0].dtype, xs[0].device)
        return result(functional_call(module, dict(zip(self.names, ws)), tuple(xs)))


def result(y):
    """The map, of what a network or a decoder returns."""
    y = y[0] if isinstance(y, tuple) else y
    return y if isinstance(y, torch.Tensor) else y.predicted_depth


def case(name, width, whole, trains):
    family = depth_models.FAMILIES[name]
    side = 128 if width == "tiny" else family.side
    subject = Subject(family, width, side, whole)
    return Case(
        label=f"{name} {width} {'whole' if whole else 'decoder'}",
        shape=(1, 3, side, side),
        work={FORWARD: 1, TRAINING: 1},
        unit="images/s",
        setup=subject.setup,
        eager=partial(subject.run, False),
        ours=lambda backend: partial(subject.run, True),
        gradient_floor=5e-2,
        error_floor=1e-5,
        trains=trains,
        patience=10,
    )


def cases(args):
    names = args.families or ["depth-anything"]
    widths = args.widths or (["tiny"] if args.quick else ["S", "L"])
    parts = [False, True] if args.whole else [False]
    pairs = [
        (name, width) for name in names for width in widths if width in ("tiny", *depth_models.FAMILIES[name].widths)
    ]
    return [case(name, width, whole, TRAINING in args.directions) for name, width in pairs for whole in parts]


def add_options(parser):
    parser.add_argument("--families", type=options.names_from(depth_models.FAMILIES), help="a,b,c")
    parser.add_argument("--widths", type=options.names_from(WIDTHS), help="S,B,L: those that a family comes in")
    parser.add_argument("--whole", action="store_true", help="the whole network as well as its decoder")


BENCHMARK = cli.Spec("accelerate", cases, shapes=((3, 518, 518),), quick=((3, 128, 128),), add_options=add_options)


def test_accelerate(benchmark, measurement):
    measurement(benchmark)


if __name__ == "__main__":
    sys.exit(cli.main(BENCHMARK))
