"""Triton's probes: launches of ``triton_kernels`` at small sizes, ragged ones too, and what they must compute."""

from __future__ import annotations

import numpy as np

from emulator.tensormap import TensorMap
from emulator.types import from_bits, to_bits
from probes.triton_launch import TritonProbe, compile_ptx, launch_arguments, launch_shape, runs_with

__all__ = ["PROBES", "TritonProbe", "compile_ptx", "exact", "launch_arguments", "launch_shape", "runs_with"]

# -- arguments ---------------------------------------------------------------------------------------------------------

KINDS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def _random(rng: np.random.Generator, kind: str, *shape: int, scale: float = 1.0) -> np.ndarray:
    values = (scale * rng.standard_normal(shape)).astype(np.float32)
    return to_bits(values, "bf16") if kind == "bf16" else values.astype(KINDS[kind])


def _poison(kind: str, *shape: int) -> np.ndarray:
    """NaN everywhere."""
    return np.full(shape, 0x7FFF, np.uint16) if kind == "bf16" else np.full(shape, np.nan, KINDS[kind])


def exact(array: np.ndarray) -> np.ndarray:
    """In float64; uint16 is bfloat16."""
    return np.asarray(from_bits(array, "bf16") if array.dtype == np.uint16 else array, np.float64)


def _up(size: int, block: int) -> int:
    return -(-size // block)


def _convolved(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """x (N, H, W, C), w (K, 3, 3, C)."""
    n, h, width, _ = x.shape
    padded = np.pad(exact(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((n, h, width, len(w))) + exact(bias)
    for i in range(3):
        for j in range(3):
            y += padded[:, i : i + h, j : j + width] @ exact(w[:, i, j]).T
    return y


# Relative L2 errors: rounding of the result, twice over; float32 is that of sums. TF32 inputs may be truncated.
TOLERANCES = {"f32": 2e-6, "tf32": 2e-3, "tf32x3": 2e-6, "f16": 5e-4, "bf16": 4e-3}

Sizes = tuple[int, ...]

# -- products and convolutions -----------------------------------------------------------------------------------------


def _matmul_pointers(name: str, kind: str, sizes: Sizes, blocks: Sizes, precision: str = "ieee", **more) -> TritonProbe:
    m, n, k = sizes
    bm, bn, bk = blocks

    def arguments(rng):
        a, b = _random(rng, kind, m, k), _random(rng, kind, k, n)
        return [a, b, _poison(kind, m, n), *map(np.int32, sizes)]

    return TritonProbe(
        f"matmul_pointers_{name}",
        "matmul_pointers",
        arguments,
        lambda arguments: [exact(arguments[0]) @ exact(arguments[1])],
        (2,),
        {"PRECISION": precision, "BM": bm, "BN": bn, "BK": bk},
        (_up(m, bm), _up(n, bn)),
        tolerance=TOLERANCES.get(precision, TOLERANCES[kind]),
        **more,
    )


def _matmul_descriptors(name: str, kind: str, sizes: Sizes, blocks: Sizes, transposed: str, **more) -> TritonProbe:
    m, n, k = sizes
    bm, bn, bk = blocks
    of_a, of_b = "a" in transposed, "b" in transposed

    def arguments(rng):
        a = TensorMap(_random(rng, kind, *((k, m) if of_a else (m, k))), (bk, bm) if of_a else (bm, bk), kind)
        b = TensorMap(_random(rng, kind, *((n, k) if of_b else (k, n))), (bn, bk) if of_b else (bk, bn), kind)
        return [a, b, TensorMap(_poison(kind, m, n), (bm, bn), kind), np.int32(k)]

    def expected(arguments):
        a, b = (exact(argument.array) for argument in arguments[:2])
        return [(a.T if of_a else a) @ (b.T if of_b else b)]

    return TritonProbe(
        f"matmul_descriptors_{name}",
        "matmul_descriptors",
        arguments,
        expected,
        (2,),
        {"A_TRANSPOSED": of_a, "B_TRANSPOSED": of_b, "BM": bm, "BN": bn, "BK": bk},
        (_up(m, bm), _up(n, bn)),
        tolerance=TOLERANCES["tf32" if kind == "f32" else kind],
        **{"archs": (90,), **more},
    )


def _conv_pointers(name: str, kind: str, sizes: Sizes, blocks: Sizes, precision: str = "ieee", **more) -> TritonProbe:
    n, h, w, c, k = sizes
    bm, bn, bc = blocks

    def arguments(rng):
        weights = _random(rng, kind, k, 3, 3, c, scale=(9 * c) ** -0.5)
        tensors = [_random(rng, kind, n, h, w, c), weights, _random(rng, "f32", k), _poison(kind, n, h, w, k)]
        return [*tensors, *map(np.int32, sizes)]

    return TritonProbe(
        f"conv3x3_pointers_{name}",
        "conv3x3_pointers",
        arguments,
        lambda arguments: [_convolved(*arguments[:3])],
        (3,),
        {"PRECISION": precision, "BM": bm, "BN": bn, "BC": bc},
        (_up(n * h * w, bm), _up(k, bn)),
        tolerance=TOLERANCES.get(precision, TOLERANCES[kind]),
        **more,
    )


def _conv_descriptors(name: str, kind: str, sizes: Sizes, blocks: Sizes, taps: int = 3, **more) -> TritonProbe:
    n, h, w, c, k = sizes
    th, tw, bn, bc = blocks

    def arguments(rng):
        weights = _random(rng, kind, *((9, k, c) if taps == 3 else (9 * c, k)), scale=(9 * c) ** -0.5)
        return [
            TensorMap(_random(rng, kind, n, h, w, c), (1, th, tw, bc), kind),
            TensorMap(weights, (1, bn, bc) if taps == 3 else (bc, bn), kind),
            _random(rng, "f32", k),
            TensorMap(_poison(kind, n, h, w, k), (1, th, tw, bn), kind),
            *map(np.int32, (h, w, c, k)),
        ]

    def expected(arguments):
        x, weights, bias = arguments[0].array, arguments[1].array, arguments[2]
        kernel = weights.transpose(1, 0, 2) if taps == 3 else weights.reshape(9, c, k).transpose(2, 0, 1)
        return [_convolved(x, kernel.reshape(k, 3, 3, c), bias)]

    return TritonProbe(
        f"conv3x3_descriptors_{name}",
        "conv3x3_descriptors",
        arguments,
        expected,
        (3,),
        {"TAPS": taps, "TH": th, "TW": tw, "BN": bn, "BC": bc},
        (_up(w, tw), n * _up(h, th), _up(k, bn)),
        tolerance=TOLERANCES["tf32" if kind == "f32" else kind],
        **{"archs": (90,), **more},
    )


def _maxpool(name: str, kind: str, sizes: Sizes, blocks: Sizes, **more) -> TritonProbe:
    n, h, w, c = sizes
    th, tw, bc = blocks

    def arguments(rng):
        x = TensorMap(_random(rng, kind, *sizes), (1, th, tw, bc), kind, nan_fill=True)
        return [x, TensorMap(_poison(kind, *sizes), (1, th, tw, bc), kind), np.int32(h)]

    def expected(arguments):
        x = np.pad(exact(arguments[0].array), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        return [np.max([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)]

    return TritonProbe(
        f"maxpool3_descriptors_{name}",
        "maxpool3_descriptors",
        arguments,
        expected,
        (1,),
        {"TH": th, "TW": tw, "BC": bc},
        (_up(w, tw), n * _up(h, th), _up(c, bc)),
        **{"archs": (90,), **more},
    )


# -- reductions, elements, moves ---------------------------------------------------------------------------------------


def _softmax(name: str, kind: str, m: int, n: int, **more) -> TritonProbe:
    def arguments(rng):
        return [_random(rng, kind, m, n), _poison(kind, m, n), np.int32(n)]

    def expected(arguments):
        power = np.exp(exact(arguments[0]))
        return [power / power.sum(1, keepdims=True)]

    block = {"BN": 1 << (n - 1).bit_length()}
    tolerance = TOLERANCES[kind]
    return TritonProbe(
        f"softmax_{name}", "softmax", arguments, expected, (1,), block, (m,), tolerance=tolerance, **more
    )


def _reduce(name: str, kind: str, m: int, n: int, blocks: Sizes, **more) -> TritonProbe:
    def arguments(rng):
        x = _random(rng, kind, m, n)
        x[0] = x[0, 0]  # ties: the first is the one
        outputs = [_poison("f32", m), np.full(m, -1, np.int32), _poison("f32", m), _poison("f32", m, n)]
        return [x, *outputs, _poison("f32", n), np.int32(m), np.int32(n)]

    def expected(arguments):
        x = exact(arguments[0])
        return [x.max(1), x.argmax(1).astype(np.float64), x.sum(1), x.cumsum(1), x.max(0)]

    constexprs = dict(zip(("BM", "BN"), blocks))
    tolerance = TOLERANCES["f32"]
    return TritonProbe(
        f"reduce_{name}", "reduce", arguments, expected, (1, 2, 3, 4, 5), constexprs, tolerance=tolerance, **more
    )


def _arithmetic(name: str, kind: str, n: int, **more) -> TritonProbe:
    def arguments(rng):
        return [_random(rng, kind, n), _random(rng, kind, n), _poison(kind, n), np.int32(n)]

    def expected(arguments):
        a, b = map(exact, arguments[:2])
        return [np.where(a > b, a * b + np.maximum(a, b), np.minimum(a, b) - a)]

    return TritonProbe(
        f"arithmetic_{name}",
        "arithmetic",
        arguments,
        expected,
        (2,),
        {"BLOCK": 512},
        (_up(n, 512),),
        {"num_warps": 2},
        tolerance=TOLERANCES[kind],
        **more,
    )


def _functions(kind: str, n: int = 300) -> TritonProbe:
    def arguments(rng):
        x = rng.uniform(0.5, 4.0, n).astype(np.float32)
        return [x.astype(KINDS[kind]), _poison(kind, 5, n), np.int32(n)]

    def expected(arguments):
        x = exact(arguments[0])
        return [np.stack([np.exp(x), 1 / (1 + np.exp(-x)), np.log(x), np.sqrt(x), np.tanh(x)])]

    return TritonProbe(
        f"functions_{kind}",
        "functions",
        arguments,
        expected,
        (1,),
        {"BLOCK": 256},
        (_up(n, 256),),
        {"num_warps": 2},
        tolerance=TOLERANCES[kind],
    )


def _casts(n: int = 528) -> TritonProbe:
    def arguments(rng):
        outputs = [_poison("f16", n), _poison("bf16", n), np.full(n, 99, np.int8), _poison("f32", n)]
        return [_random(rng, "f32", n, scale=4.0), *outputs, np.int32(n)]

    def expected(arguments):
        x = arguments[0]
        half, brain = exact(x.astype(np.float16)), exact(to_bits(x, "bf16"))
        byte = np.trunc(np.clip(exact(x * np.float32(16)), -127, 127))
        return [half, brain, byte, half + brain + byte]

    more = {"options": {"num_warps": 2}, "tolerance": 1e-7}
    return TritonProbe("casts", "casts", arguments, expected, (1, 2, 3, 4), {"BLOCK": 512}, (_up(n, 512),), **more)


def _transpose(name: str, kind: str, m: int, n: int, blocks: Sizes, **more) -> TritonProbe:
    bm, bn = blocks

    def arguments(rng):
        return [_random(rng, kind, m, n), _poison(kind, n, m), np.int32(m), np.int32(n)]

    constexprs, grid = {"BM": bm, "BN": bn}, (_up(m, bm), _up(n, bn))
    expected = lambda arguments: [exact(arguments[0]).T]  # noqa: E731
    return TritonProbe(f"transpose_{name}", "transpose", arguments, expected, (1,), constexprs, grid, **more)


def _transpose_descriptors(name: str, kind: str, m: int, n: int, blocks: Sizes, **more) -> TritonProbe:
    bm, bn = blocks

    def arguments(rng):
        return [TensorMap(_random(rng, kind, m, n), blocks, kind), TensorMap(_poison(kind, n, m), (bn, bm), kind)]

    return TritonProbe(
        f"transpose_descriptors_{name}",
        "transpose_descriptors",
        arguments,
        lambda arguments: [exact(arguments[0].array).T],
        (1,),
        {"BM": bm, "BN": bn},
        (_up(m, bm), _up(n, bn)),
        **{"archs": (90,), **more},
    )


def _gather_atomic(kind: str, n: int = 300, cells: int = 40, block: int = 256) -> TritonProbe:
    def arguments(rng):
        index = rng.integers(0, cells, n).astype(np.int32)
        whole = _up(n, block) * block
        table, value = ((rng.integers(-4, 5, size) / 4).astype(KINDS[kind]) for size in (cells, n))
        total, count, largest = np.ones(cells, KINDS[kind]), np.zeros(cells, np.int32), np.full(cells, -1, np.int32)
        claimed, before = rng.integers(0, 3, whole).astype(np.int32), np.full(whole, -1, np.int32)
        return [table, index, value, total, count, largest, claimed, before, np.int32(n)]

    def expected(arguments):
        table, index, value, total, count, largest, claimed, _, _ = arguments
        total, count, largest = total.astype(np.float64), count.astype(np.float64), largest.astype(np.float64)
        np.add.at(total, index, exact(value) * exact(table)[index])
        np.add.at(count, index, 1)
        np.maximum.at(largest, index, np.arange(n))
        return [total, count, largest, np.where(claimed == 0, 7.0, claimed), claimed.astype(np.float64)]

    return TritonProbe(
        f"gather_atomic_{kind}",
        "gather_atomic",
        arguments,
        expected,
        (3, 4, 5, 6, 7),
        {"BLOCK": block},
        (_up(n, block),),
    )


def _options(num_warps: int = 4, num_stages: int = 3, **more) -> dict[str, dict[str, int]]:
    return {"options": {"num_warps": num_warps, "num_stages": num_stages, **more}}


# (M, N, K), then blocks; (N, H, W, C, K), then blocks of pixels (TH, TW of descriptors), output and input channels.
PROBES = [
    _matmul_pointers("f16", "f16", (80, 96, 128), (64, 64, 32), **_options()),
    _matmul_pointers("bf16_ragged", "bf16", (70, 52, 50), (64, 64, 32), **_options()),
    _matmul_pointers("tf32", "f32", (64, 48, 80), (64, 32, 32), "tf32", **_options()),
    _matmul_pointers("tf32x3", "f32", (64, 16, 24), (64, 16, 16), "tf32x3", **_options(4, 2)),
    _matmul_pointers("f32", "f32", (20, 16, 24), (16, 16, 16), **_options(1, 2)),
    _matmul_descriptors("f16_b_nk", "f16", (72, 104, 136), (64, 64, 64), "b", **_options()),
    _matmul_descriptors("bf16_b_kn", "bf16", (72, 136, 96), (64, 128, 32), "", **_options()),
    _matmul_descriptors("f16_a_km", "f16", (136, 64, 64), (128, 64, 32), "a", **_options(8)),
    _matmul_descriptors("bf16_ab", "bf16", (64, 40, 48), (64, 32, 16), "ab", **_options(4, 2)),
    _matmul_descriptors("tf32_b_nk", "f32", (72, 36, 44), (64, 32, 32), "b", **_options()),
    _matmul_descriptors("f16_cluster", "f16", (72, 104, 136), (64, 64, 64), "b", **_options(num_ctas=2)),
    _conv_pointers("f16", "f16", (1, 9, 11, 48, 64), (64, 64, 32), **_options()),
    _conv_pointers("bf16", "bf16", (2, 5, 9, 32, 48), (64, 32, 32), **_options()),
    _conv_pointers("f16_ragged", "f16", (1, 7, 9, 20, 12), (32, 16, 16), **_options(2)),
    _conv_pointers("tf32", "f32", (1, 5, 13, 16, 32), (64, 32, 16), "tf32", **_options()),
    _conv_pointers("f32", "f32", (1, 3, 5, 16, 16), (16, 16, 16), **_options(2, 2)),
    _conv_descriptors("row_f16", "f16", (1, 3, 70, 72, 64), (1, 64, 64, 64), **_options()),
    _conv_descriptors("row_bf16_kn", "bf16", (2, 2, 64, 40, 72), (1, 64, 64, 32), 2, **_options()),
    _conv_descriptors("tile_bf16", "bf16", (2, 9, 17, 64, 40), (8, 16, 64, 64), **_options(8)),
    _conv_descriptors("tile_f16_kn", "f16", (1, 7, 12, 72, 64), (8, 8, 64, 32), 2, **_options()),
    _conv_descriptors("row_tf32", "f32", (1, 2, 66, 20, 36), (1, 64, 32, 32), **_options()),
    _maxpool("f16", "f16", (2, 5, 9, 24), (4, 8, 16), archs=(80, 90)),
    _maxpool("bf16", "bf16", (1, 9, 6, 72), (4, 4, 64)),
    _maxpool("f32", "f32", (1, 3, 5, 12), (2, 4, 8), options={"num_warps": 2}),
    _softmax("f32", "f32", 3, 333),
    _softmax("f16_aligned", "f16", 2, 1008, options={"num_warps": 8}),
    _softmax("bf16", "bf16", 3, 64, options={"num_warps": 1}),
    _softmax("cluster", "f32", 2, 500, archs=(90,), since="3.7", **_options(num_ctas=2)),
    _reduce("f32", "f32", 7, 50, (8, 64)),
    _reduce("f16", "f16", 16, 16, (16, 16), options={"num_warps": 2}),
    _arithmetic("f32", "f32", 700),
    _arithmetic("f16", "f16", 700),
    _arithmetic("bf16", "bf16", 700),
    _arithmetic("f16_packed", "f16", 720),
    _arithmetic("bf16_packed", "bf16", 720),
    *map(_functions, ("f32", "f16")),
    _casts(),
    _transpose("f32", "f32", 40, 33, (32, 32)),
    _transpose("f16", "f16", 80, 48, (64, 32)),
    _transpose_descriptors("f16", "f16", 72, 40, (64, 32), archs=(80, 90)),
    _transpose_descriptors("f32", "f32", 36, 40, (32, 32)),
    *map(_gather_atomic, ("f32", "f16")),
]
