"""Random cases of every op against float64, forward and gradients; drawn from a seed, so that one line brings one back.

    python tests/random_cases.py --cases 2000                       # every op; exit status 1 if any case is wrong
    python tests/random_cases.py --ops crp --seed 3 --only 117      # one case again

`tests/test_random_cases.py` runs a few of them; `tests/sanitized.sh` runs them with a core that checks its memory.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import (
    LAYOUTS,
    MEMORIES,
    assert_same_bits,
    convolving,
    in_memory,
    laid_out,
    public,
    running_on,
    unchanged,
    with_gradients,
)
from refinenet_fast import _native, backends, testing, use_backend
from refinenet_fast.backends import Backend, WayIn, WayOut
from refinenet_fast.ops._autocast import activations
from refinenet_fast.testing import Call, Data, Rows, crp_call, fuse_call, rcu_call

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
LARGE = 20_000  # elements of an image
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Draw(random.Random):
    """The sizes and options of a case."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def side(self) -> int:
        return self.choice([1, self.choice(PRIMES), 4 * self.randint(1, 10), self.randint(1, 40)])

    def size(self) -> tuple[int, int]:
        return self.side(), self.side()

    def channels(self) -> int:
        """Few, mostly: at times more than a product of matrices takes at once (256)."""
        if self.chance(0.03):
            return self.randint(257, 400)
        return self.choice([self.randint(1, 70), 2 * self.randint(0, 34) + 1, 16 * self.randint(1, 4)])

    def shape(self) -> tuple[int, int, int, int]:  # (N, C, H, W)
        """One image where three would be large: the truth in float64 is what takes the time."""
        c, h, w = self.channels(), *self.size()
        return (self.randint(1, 3 if c * h * w < LARGE else 1), c, h, w)


@dataclass(frozen=True)
class Setting:
    """What a case runs under."""

    isa: str
    threads: int
    convolving: str

    @staticmethod
    def drawn(draw: Draw) -> Setting:
        convolving = draw.choice(["chosen", "chosen", "engine", "engine", "vendor"])
        isas = _native._C.cpu_isas() if _native._C else [""]
        return Setting(draw.choice(isas), draw.choice([1, 2]), convolving)

    @contextmanager
    def applied(self) -> Iterator[None]:
        if _native._C is None:  # another backend's cases
            yield
            return
        with convolving(self.convolving), running_on(self.isa, self.threads):
            yield


class Case(NamedTuple):
    what: str  # for people: sizes, layouts and options
    tensors: Sequence[Tensor | None]  # which have to be left as they are
    rows: Callable[[], Rows]  # runs it


def check_hot_path(call: Call, images: int, backend: str, needs: list[bool], gy_layout: str) -> Rows:
    """The op below autograd against float64, then the public function, which has to give the same bits."""
    maps = [None if x is None else activations(x) for x in call.tensors[:images]]
    below = replace(call, tensors=[*maps, *call.tensors[images:]])
    yield from testing.check_call(below, backend, needs)
    y, saved = below.train(backend)
    gy = laid_out(torch.randn_like(y), gy_layout)
    grads = below.gradients(gy, saved, backend, needs)
    with use_backend(backend):
        again, grads_again = with_gradients(public, call, gy, needs)
    assert_same_bits([again, *grads_again], [y, *grads])


def hot_path(draw: Draw, call: Call, images: int, backend: str) -> Case:
    """A call with its tensors laid out anew, some of its biases left out and some of its tensors frozen."""
    mixed = call.tensors[0].dtype != torch.float32 and draw.chance(0.5)  # float32 parameters beside bfloat16
    drop, memory = draw.choice([0, 0, 0.5, 1]), draw.choice(MEMORIES)
    layouts = [draw.choice(LAYOUTS) for _ in range(images)]
    tensors = [None if x is None else laid_out(x, how) for x, how in zip(call.tensors, layouts)]
    for t in call.tensors[images:]:
        t = t.float() if mixed and t is not None else t
        if t is not None and t.dim() == 4:
            t = in_memory(t, memory)
        elif t is not None and draw.chance(drop):
            t = None
        tensors.append(t)
    frozen = draw.choice([0, 0, 0.3, 0.7])
    needs = [t is not None and not draw.chance(frozen) for t in tensors]
    needs[0] = needs[0] or not any(needs)
    call, gy_layout = replace(call, tensors=tensors), draw.choice(LAYOUTS)
    shapes = " ".join("-" if t is None else "x".join(map(str, t.shape)) for t in tensors)
    what = f"{shapes} {call.options} {layouts} gy {gy_layout}, weights {memory}{', float32' if mixed else ''}"
    what += f", needs {''.join('01'[n] for n in needs)}"
    return Case(what, tensors, lambda: check_hot_path(call, images, backend, needs, gy_layout))


# -- the ops -----------------------------------------------------------------------------------------------------------


def crp(draw: Draw, data: Data, backend: str) -> Case:
    options = {"order": draw.choice(["pool-conv", "conv-pool"]), "relu": draw.chance(0.7)}
    call = crp_call(draw.shape(), data, draw.randint(1, 4), draw.choice([1, 3, 3]), biases=True, **options)
    return hot_path(draw, call, 1, backend)


def rcu(draw: Draw, data: Data, backend: str) -> Case:
    options: dict[str, Any] = {"kernel": draw.choice([1, 3, 3]), "skip": draw.choice(["raw", "relu"])}
    options |= {"units": draw.choice([1, 1, 2, 3]), "middle": draw.choice([None, draw.channels()])}
    options |= {"recompute": draw.chance(0.5), "adds": draw.choice(["", "1", "2", "123"])}
    return hot_path(draw, rcu_call(draw.shape(), data, biases="12", **options), 1 + options["units"], backend)


def fuse(draw: Draw, data: Data, backend: str) -> Case:
    """Paths of few sizes, so that some have the same; those without a convolution have the result's channels."""
    n, channels, few = draw.randint(1, 3), draw.channels(), [draw.size() for _ in range(draw.randint(1, 3))]
    kernels = [draw.choice([3, 3, 1, None]) for _ in range(draw.randint(1, 4))]
    shapes = [(n, draw.channels() if kernel else channels, *draw.choice(few)) for kernel in kernels]
    size, corners = draw.choice([None, draw.size(), draw.choice(few)]), draw.chance(0.5)
    call = fuse_call(shapes, data, kernels, channels, True, size, corners)
    return hot_path(draw, call, len(shapes), backend)


def maxpool5(draw: Draw, data: Data, backend: str) -> Case:
    shape, relu, how = draw.shape(), draw.chance(0.5), [draw.choice(LAYOUTS) for _ in range(3)]
    x, gy, add = (laid_out(data(*shape, salt=i), how[i]) for i in range(3))
    add = add if draw.chance(0.5) else None
    what = f"{shape} relu={relu} {how}{'' if add is None else ' add'}"
    return Case(what, [x, gy, add], lambda: testing.check_maxpool5(backends.get(backend), x, gy, relu, add))


def upsample_add(draw: Draw, data: Data, backend: str) -> Case:
    shape, how = draw.shape(), [draw.choice(LAYOUTS) for _ in range(3)]
    large, corners = (*shape[:2], *draw.choice([draw.size(), (2 * shape[2], 2 * shape[3])])), draw.chance(0.5)
    x, gy, add = (laid_out(data(*(large if i else shape), salt=i), how[i]) for i in range(3))
    add, overwrite = draw.choice([(None, False), (add, False), (add, True)])
    what = f"{shape} to {large[2:]} align_corners={corners} {how}"
    what += "" if add is None else " overwrites add" if overwrite else " add"
    kernels = backends.get(backend)
    return Case(what, [x, gy, add], lambda: testing.check_bilinear(kernels, x, gy, corners, add, overwrite))


def conv3x3(draw: Draw, data: Data, backend: str) -> Case:
    (n, c, h, w), k = draw.shape(), draw.channels()
    salts = iter(range(100))

    def image(channels: int, size: tuple[int, int] = (h, w)) -> Tensor:  # (N, channels, *size)
        return laid_out(data(n, channels, *size, salt=next(salts)), draw.choice(LAYOUTS))

    def images(channels: int) -> tuple[Tensor, ...]:
        return tuple(image(channels) for _ in range(draw.choice([0, 0, 1, 2])))

    kernel, memory, pack, mixed = draw.choice([1, 3, 3]), draw.choice(MEMORIES), draw.chance(0.5), draw.chance(0.5)
    x, gy, weight = image(c), image(k), in_memory(data.weight(k, c, kernel, salt=100), memory)
    weight, bias = (t.float() if mixed else t for t in (weight, data(k, salt=101)))
    way_in = WayIn(relu=draw.chance(0.5), pool=draw.chance(0.3))
    select, low = image(k), image(k, draw.size())
    way_out = WayOut(
        bias=bias if draw.chance(0.5) else None,
        relu=draw.chance(0.3),
        select=select if draw.chance(0.3) else None,
        add=images(k),
        add_relu=images(k),
        upsample=low if draw.chance(0.3) else None,
        align_corners=draw.chance(0.5),
    )
    way_back = WayOut(select=draw.choice([None, x]), add=images(c))
    what = f"{(n, c, h, w)} to {k}, {kernel}x{kernel} {memory}{' float32' if mixed else ''} pack={pack} {way_in} "
    what += f"way out {steps(way_out)} and back {steps(way_back)}"
    given = [x, weight, bias, gy, select, low, *way_out.add, *way_out.add_relu, *way_back.add]
    kernels: Backend = backends.get(backend)
    return Case(what, given, lambda: testing.check_conv3x3(kernels, x, weight, gy, way_in, way_out, way_back, pack))


def steps(way_out: WayOut) -> str:
    """Its tensors as shapes."""
    every = {name: getattr(way_out, name) for name in way_out.__dataclass_fields__}
    given = {name: value for name, value in every.items() if value is not None and value != () and value is not False}
    sized = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in given.items()}
    return ", ".join(f"{name}={len(v) if name.startswith('add') else v}" for name, v in sized.items())


OPS = {f.__name__: f for f in (crp, rcu, fuse, maxpool5, upsample_add, conv3x3)}


# -- running them ------------------------------------------------------------------------------------------------------


def mismatches(case: Case) -> list[str]:
    """What is wrong with it, in words."""
    try:
        with unchanged(*case.tensors):
            rows = list(case.rows())
    except Exception as error:  # of any kind: the other cases go on
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return [f"{op} {way}: error {error:.3g}, limit {limit:.3g}" for op, way, error, limit in rows if not error <= limit]


def run(
    op: str,
    numbers: Iterable[int],
    seed: int = 0,
    backend: str = "cpu",
    dtype: str | None = None,
    verbose: bool = False,
) -> list[str]:
    """The mismatches of these cases of an op: how to run each again, what it is, its error and limit. Printed, too."""
    found = []
    for number in numbers:
        draw = Draw(f"{seed} {op} {number}")
        named = dtype or draw.choice(["float32", "float32", "bfloat16"])
        setting = Setting.drawn(draw)
        data = Data(DTYPES[named], integers=draw.chance(0.2), seed=draw.randrange(10**6))
        again = f"--ops {op} --seed {seed} --only {number} --backend {backend}{f' --dtype {dtype}' if dtype else ''}"
        case = OPS[op](draw, data, backend)
        description = f"{again}  # {named}{' integers' if data.integers else ''} {case.what}; {setting}"
        if verbose:  # before it runs: a sanitizer ends the process
            print(description, flush=True)
        torch.manual_seed(number)
        with setting.applied():
            found += [f"{wrong}\n  python tests/random_cases.py {description}" for wrong in mismatches(case)]
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=200, help="of each op (default: %(default)s)")
    parser.add_argument("--ops", default=",".join(OPS), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case, to run it again")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: both, float32 more often")
    parser.add_argument("--verbose", action="store_true", help="print each case before it runs")
    options = parser.parse_args()
    options.ops = options.ops.split(",")
    if unknown := sorted(set(options.ops) - set(OPS)):
        parser.error(f"--ops: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    return options


def main() -> int:
    options = parsed()
    os.environ["REFINENET_FAST_TABLES"] = tempfile.mkdtemp(prefix="no-tables-")  # what a user has tuned decides no case
    numbers = range(options.cases) if options.only is None else [options.only]
    print(f"{getattr(_native._C, '__file__', _native.missing)}, PyTorch {torch.__version__}", flush=True)
    count = 0
    for op in options.ops:
        start = time.perf_counter()
        found = run(op, numbers, options.seed, options.backend, options.dtype, options.verbose)
        count += len(found)
        print(*found, sep="\n", end="\n" if found else "")
        took = time.perf_counter() - start
        print(f"{op}: {len(numbers)} cases, {len(found)} mismatches, {took:.0f} s", flush=True)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
