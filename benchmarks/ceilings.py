"""What this machine can do at best: the figures that every other benchmark is measured by.

    python benchmarks/ceilings.py --device cuda --json ceilings.json

Matrix products, copy bandwidth, the vendor's bare and fused 3x3 convolutions at every shape of
RefineNet's decoder, and PyTorch's own max pool and bilinear upsample-add, eager and compiled.
Needs torch only. The JSON file is rewritten after each section, so a run that is cut off keeps
what it measured; a measurement that fails is recorded with its reason and the rest goes on.
"""

import itertools
import sys
import time
from functools import partial

import torch
import torch.nn.functional as F

import options
from timing import GaveUp, Timed, interleave, patience, synchronize

# (input channels, output channels, side): the decoder of RefineNet on a 512x512 image. First the
# shapes it spends most time at, then the adaptive convolutions that read the trunk.
CONVS = (
    (256, 256, 128),
    (256, 256, 64),
    (256, 256, 32),
    (512, 512, 16),
    (256, 256, 16),
    (512, 256, 64),
    (1024, 256, 32),
    (2048, 512, 16),
)
MAPS = ((256, 128), (256, 64), (256, 32), (512, 16))  # (channels, side) of pools and fusions
DTYPES = {  # tf32: float32 tensors, multiplied in the tensor cores' reduced precision
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


class Bench:
    """Measures one thing after another on `device` until the budget of `seconds` is used up."""

    def __init__(self, device, seconds, each):
        self.device, self.each = device, each
        self.deadline = time.monotonic() + seconds
        self.generator = torch.Generator(device).manual_seed(0)
        self.rows = []
        self.cuda = device.type == "cuda"
        self.batches = (8, 1) if self.cuda else (1,)
        self.dtypes = ("bf16", "fp16", "tf32") if self.cuda else ("fp32",)
        if not self.cuda and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.dtypes += ("bf16",)

    def normal(self, *shape, dtype, scale=1.0):
        """Normal data of standard deviation `scale`; maps and weights in channels_last."""
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        return x.to(DTYPES[dtype]).contiguous(memory_format=layout)

    def measure(self, make, flops=None, nbytes=None, **labels):
        """Appends a row; `make()` allocates the inputs and returns the function to time.

        flops: multiplications plus additions of one call; nbytes: each input read once plus each
        output written once.
        """
        row = dict(labels)
        self.rows.append(row)
        if time.monotonic() > self.deadline:
            row["skipped"] = "out of time"
            return
        name = " ".join(map(str, labels.values()))
        try:
            with patience(60, "the first run"):
                run = make()
                run()  # compiles, and lets the vendor's library try its algorithms
                synchronize(self.device)
            (time_ms,) = interleave([Timed(run)], self.device, self.each, at_least=3)
        except (Exception, GaveUp) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"  {name}: {row['error']}", flush=True)
            return
        row.update(vars(time_ms))
        giga = (flops or nbytes) / time_ms.median_ms / 1e6
        if flops:
            row.update(flops=flops, gflops=giga)
        else:
            row.update(bytes=nbytes, gbytes_per_s=giga)
        unit = "GFLOP/s" if flops else "GB/s"
        print(f"  {name}: {time_ms.median_ms:.3f} ms, {giga:.0f} {unit}", flush=True)


# ---- sections -----------------------------------------------------------------------------


def matmul(bench):
    """Products: one 3x3 convolution's FLOPs (256 channels, 128x128, batch 8), and a large one."""
    sizes = ((4608, 4096, 4096), (8192, 8192, 8192))
    if not bench.cuda:  # the same convolution at 64x64, batch 1
        sizes = ((2304, 1024, 1024), (2048, 2048, 2048))
    for dtype, (m, n, k) in itertools.product(bench.dtypes, sizes):
        make = partial(_product, bench, m, n, k, dtype)
        bench.measure(make, flops=2 * m * n * k, case=f"{m}x{n}x{k}", dtype=dtype)


def _product(bench, m, n, k, dtype):
    a = bench.normal(m, k, dtype=dtype)
    b = bench.normal(k, n, dtype=dtype, scale=k**-0.5)
    return lambda: a @ b


def copy(bench):
    """A copy far larger than any cache."""
    size = 2**30 if bench.cuda else 2**28
    bench.measure(partial(_copy, bench, size), nbytes=2 * size, case=f"{size >> 20} MiB")


def _copy(bench, size):
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def conv(bench):
    """The bare 3x3 convolution: forward, input gradient, weight gradient."""
    kinds = [(dtype, batch) for dtype in bench.dtypes for batch in bench.batches]
    if bench.cuda:  # the other formats only where the GPU is full
        kinds = [("bf16", 8), ("bf16", 1), ("fp16", 8), ("tf32", 8)]
    directions = ("forward", "input gradient", "weight gradient")
    for (dtype, batch), shape, direction in itertools.product(kinds, CONVS, directions):
        c_in, c_out, side = shape
        bench.measure(
            partial(_conv, bench, batch, *shape, dtype, direction),
            flops=_conv_flops(batch, *shape),
            case=f"{batch}x{c_in}->{c_out} at {side}x{side}",
            direction=direction,
            dtype=dtype,
        )


def _conv_flops(batch, c_in, c_out, side):
    return 2 * batch * side * side * c_in * c_out * 9


def _conv(bench, batch, c_in, c_out, side, dtype, direction):
    x = bench.normal(batch, c_in, side, side, dtype=dtype)
    w = bench.normal(c_out, c_in, 3, 3, dtype=dtype, scale=(9 * c_in) ** -0.5)
    if direction == "forward":
        return lambda: F.conv2d(x, w, padding=1)
    gy = bench.normal(batch, c_out, side, side, dtype=dtype)
    wanted = [direction == "input gradient", direction == "weight gradient", False]
    one, zero = [1, 1], [0, 0]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(gy, x, w, None, one, one, one, False, zero, 1, wanted)


def fused_conv(bench):
    """The vendor's convolution with its way out fused: + bias, ReLU; + bias, + tensor, ReLU."""
    fusions = ("bias+relu", "bias+add+relu")
    dtype = bench.dtypes[0]
    for batch, (channels, side), fusion in itertools.product(bench.batches, MAPS, fusions):
        bench.measure(
            partial(_fused_conv, bench, batch, channels, side, dtype, fusion),
            flops=_conv_flops(batch, channels, channels, side),
            case=f"{batch}x{channels} at {side}x{side}",
            fusion=fusion,
            dtype=dtype,
        )


def _fused_conv(bench, batch, channels, side, dtype, fusion):
    x, z = (bench.normal(batch, channels, side, side, dtype=dtype) for _ in range(2))
    w = bench.normal(channels, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    b = bench.normal(channels, dtype=dtype)
    one = [1, 1]
    if bench.cuda and fusion == "bias+relu":
        return lambda: torch.cudnn_convolution_relu(x, w, b, one, one, one, 1)
    if bench.cuda:
        return lambda: torch.cudnn_convolution_add_relu(x, w, z, 1.0, b, one, one, one, 1)
    # On the CPU the operators that inductor emits, with the weights packed beforehand, as it does.
    pack, pointwise = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn
    w = pack(w, one, one, one, 1, list(x.shape))
    pointwise = pointwise._convolution_pointwise
    if fusion == "bias+relu":
        return lambda: pointwise(x, w, b, one, one, one, 1, "relu", [], "")
    return lambda: pointwise.binary(x, z, w, b, one, one, one, 1, "add", 1.0, "relu", [], "")


def pool(bench):
    """PyTorch's 5x5 max pool, stride 1; backward alone, from what forward kept."""
    _both_ways(bench, _max_pool, lambda side: [side], lambda side: [side])


def _max_pool(x):
    return F.max_pool2d(x, 5, 1, 2)


def bilinear(bench):
    """PyTorch's 2x bilinear upsampling of a map, plus a map of the larger size."""
    # Backward has to compute the smaller map's gradient only: the larger one's is the incoming.
    _both_ways(bench, _upsample_add, lambda side: [side, side // 2], lambda side: [side // 2])


def _upsample_add(high, low):
    return high + F.interpolate(low, high.shape[2:], mode="bilinear", align_corners=True)


def _both_ways(bench, function, inputs, gradients):
    """Eager and compiled, forward and backward, of a function of square maps.

    inputs(side), gradients(side): the sides of the maps that forward reads and backward writes,
    for a result of that side.
    """
    dtype = bench.dtypes[0]
    maps = MAPS if bench.cuda else MAPS[:2]  # each compilation takes a CPU several seconds
    ways = list(itertools.product(("eager", "compile"), ("forward", "backward")))
    for batch, (channels, side), way in itertools.product(bench.batches, maps, ways):
        moved = [side, *(inputs if way[1] == "forward" else gradients)(side)]
        bench.measure(
            partial(_one_way, bench, function, batch, channels, inputs(side), dtype, *way),
            nbytes=batch * channels * sum(s**2 for s in moved) * DTYPES[dtype].itemsize,
            case=f"{batch}x{channels} at {side}x{side}",
            contender=way[0],
            direction=way[1],
            dtype=dtype,
        )


def _one_way(bench, function, batch, channels, sides, dtype, contender, direction):
    xs = [bench.normal(batch, channels, side, side, dtype=dtype) for side in sides]
    if contender == "compile":
        torch._dynamo.reset()
        # A compiled backward may otherwise reuse what forward kept, and then runs only once;
        # nor can a CUDA graph be replayed backwards twice.
        torch._functorch.config.donated_buffer = False
        mode = "max-autotune-no-cudagraphs" if bench.cuda else None
        function = torch.compile(function, mode=mode, dynamic=False)
    if direction == "forward":
        return lambda: function(*xs)
    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in xs]
        y = function(*leaves)
    gy = bench.normal(*y.shape, dtype=dtype)
    return lambda: torch.autograd.grad(y, leaves, gy, retain_graph=True)


SECTIONS = {f.__name__: f for f in (matmul, copy, conv, fused_conv, pool, bilinear)}


def main():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_machine_options(parser)
    sections = options.names_from(SECTIONS)
    parser.add_argument("--sections", type=sections, default=list(SECTIONS), help="a,b,c")
    seconds = options.positive(float)
    parser.add_argument("--seconds", type=seconds, help="budget; 480 on a GPU, 150 on a CPU")
    parser.add_argument("--each", type=seconds, help="for one figure; 0.2 on a GPU, 0.5 on a CPU")
    args = parser.parse_args()
    device, meta = options.set_up_machine(parser, args)
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32 products
    bench = Bench(device, args.seconds or (480 if cuda else 150), args.each or (0.2, 0.5)[not cuda])
    content = {"meta": meta, "sections": {}}
    print(f"{meta['device_name']}, torch {meta['torch']}, allocator {meta['allocator']}")
    for name in args.sections:
        content["sections"][name] = run_section(bench, SECTIONS[name])
        if args.json:
            options.write_json(args.json, content)
    failed = any(
        section["error"] or any("error" in row for row in section["rows"]) for section in content["sections"].values()
    )
    return int(failed)


def run_section(bench, section):
    """One section's rows; an error outside a measurement ends this section only."""
    print(section.__doc__, flush=True)
    start, bench.rows, error = time.monotonic(), [], None
    try:
        with torch.no_grad():
            section(bench)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        print(f"  {error}", flush=True)
    if skipped := sum("skipped" in row for row in bench.rows):
        print(f"  {skipped} left out: out of time")
    return {"rows": bench.rows, "error": error, "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    sys.exit(main())
