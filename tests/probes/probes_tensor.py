"""Probes of matrix instructions and of bulk tensor copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulator.tensormap import SIZES, TensorMap
from probes import Argument, Probe
from probes.layouts import (
    bf16,
    f16,
    fragment_a16,
    fragment_a32,
    fragment_b16,
    fragment_b32,
    fragment_d,
    fragment_d16,
    from_bf16,
    packed,
    poisoned,
    swizzled,
    tf32,
)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """So small that every sum of products here is exact, in float16 too."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """With the 8 significant bits of bfloat16, which the other formats hold too."""
    return from_bf16(bf16(rng.standard_normal(shape).astype(np.float32)))


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    return {"f16": f16, "bf16": bf16, "tf32": tf32}[kind](values)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (from_bf16(bits) if kind == "bf16" else bits.view(np.float32)).astype(np.float64)


def to_registers(matrix: np.ndarray, fragment: tuple[np.ndarray, np.ndarray], kind: str) -> np.ndarray:
    """(lanes, registers) words; float32 if that is the kind."""
    elements = matrix[fragment]
    if kind == "f32":
        return elements.astype(np.float32)
    bits = encode(elements, kind)
    return packed(bits) if bits.ndim == 3 else bits


def to_matrix(registers: np.ndarray, fragment: tuple[np.ndarray, np.ndarray], kind: str) -> np.ndarray:
    rows, columns = fragment
    matrix = np.full((rows.max() + 1, columns.max() + 1), np.nan)
    if kind == "f32":
        matrix[fragment] = registers
    else:
        elements = registers.view(np.uint16).reshape(rows.shape) if rows.ndim == 3 else registers
        matrix[fragment] = decode(elements, kind)
    return matrix


# ---- mma.sync -------------------------------------------------------------------------------------------------------


def mma(kernel: str, kind: str, k: int, d_kind: str = "f32", draw: Draw = integers, tolerance: float = 0.0) -> Probe:
    a_at, b_at = (fragment_a32(k), fragment_b32(k)) if kind == "tf32" else (fragment_a16(k), fragment_b16(k))
    d_at = fragment_d(8) if d_kind == "f32" else fragment_d16(8)

    def arguments(rng: np.random.Generator) -> list[Argument]:
        a, b, c = (to_registers(draw(rng, s), at, kd) for s, at, kd in
                   [((16, k), a_at, kind), ((k, 8), b_at, kind), ((16, 8), d_at, d_kind)])  # fmt: skip
        return [a, b, c, poisoned(c.shape, c.dtype)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        a, b = to_matrix(arguments[0], a_at, kind), to_matrix(arguments[1], b_at, kind)
        d = a @ b + to_matrix(arguments[2], d_at, d_kind)
        return [d[d_at] if tolerance else to_registers(d, d_at, d_kind)]

    name = f"mma_{kernel}" + ("_random" if tolerance else "")
    return Probe(name, "mma.cu", kernel, arguments, expected, (3,), tolerance=tolerance)


MMA = (
    mma("m16n8k16_f16", "f16", 16),
    mma("m16n8k16_f16_f16", "f16", 16, "f16"),
    mma("m16n8k16_bf16", "bf16", 16),
    mma("m16n8k8_f16", "f16", 8),
    mma("m16n8k8_bf16", "bf16", 8),
    mma("m16n8k8_tf32", "tf32", 8),
    mma("m16n8k4_tf32", "tf32", 4),
    mma("m16n8k16_bf16", "bf16", 16, draw=normal, tolerance=1e-6),
    mma("m16n8k8_tf32", "tf32", 8, draw=normal, tolerance=1e-6),
)

# ---- ldmatrix, stmatrix ---------------------------------------------------------------------------------------------

ROWS = 64  # of 8 elements of 16 bits, in shared memory
LANE, HALF = np.meshgrid(np.arange(32), np.arange(2), indexing="ij")  # (32, 2)


def matrix_rows(offsets: np.ndarray, matrix: int, trans: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row of shared memory and element in it, (32, 2), that each lane's register of this 8x8 matrix holds.

    Lanes 8i to 8i + 7 give the addresses of matrix i's rows.
    """
    row, column = LANE // 4, LANE % 4 * 2 + HALF
    if trans:
        row, column = column, row
    return offsets[8 * matrix + row] // 16, column


def move_matrix(store: bool, matrices: int, trans: bool) -> Probe:
    kernel = f"{'store' if store else 'load'}_x{matrices}{'_trans' if trans else ''}"

    def arguments(rng: np.random.Generator) -> list[Argument]:
        image = rng.integers(0, 2**32, ROWS * 4, np.uint32)
        # Scattered rows: the lanes beyond 8 * matrices, whose addresses do not count, have others.
        offsets = (16 * rng.permutation(ROWS)[:32]).astype(np.uint32)
        registers = rng.integers(0, 2**32, (32, matrices), np.uint32)
        return [registers, offsets, image] if store else [image, offsets, poisoned((32, matrices), np.uint32)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        image = arguments[2 if store else 0].copy().view(np.uint16).reshape(ROWS, 8)
        halves = arguments[0 if store else 2].copy().view(np.uint16).reshape(32, matrices, 2)
        for i in range(matrices):
            at = matrix_rows(arguments[1], i, trans)
            if store:
                image[at] = halves[:, i]
            else:
                halves[:, i] = image[at]
        return [image.reshape(-1).view(np.uint32) if store else packed(halves)]

    name = f"{'st' if store else 'ld'}matrix{kernel[kernel.index('_') :]}"
    return Probe(name, "ldmatrix.cu", kernel, arguments, expected, (2,), arch="sm_90a" if store else "sm_80")


def transpose_expected(arguments: list[Argument]) -> list[np.ndarray]:
    matrix = arguments[0].view(np.uint16).reshape(8, 8)  # lane i has elements 2i and 2i + 1, row after row
    return [np.ascontiguousarray(matrix.T).reshape(-1).view(np.uint32)]


MATRICES = (
    *(move_matrix(store, n, trans) for store in (False, True) for n in (1, 2, 4) for trans in (False, True)),
    Probe(
        "movmatrix",
        "ldmatrix.cu",
        "transpose",
        lambda rng: [rng.integers(0, 2**32, 32, np.uint32), poisoned(32, np.uint32)],
        transpose_expected,
        (1,),
    ),
)

# ---- wgmma ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """An operand (mn, k) in shared memory, in the canonical layouts that descriptors know.

    Attributes:
        size: Bytes of an element.
        along_k: Contiguous along k, rather than along m or n.
        swizzle: Bytes, 0 for none.
        k_first: Atoms (or core matrices) that differ in k lie beside each other, rather than those that differ in m, n.
    """

    mn: int
    k: int
    size: int
    along_k: bool
    swizzle: int
    k_first: bool

    def layout(self) -> tuple[np.ndarray, int, int]:
        """Byte addresses before the swizzle (mn, k), leading and stride byte offset."""
        unit, width = 16 // self.size, max(self.swizzle // 16, 1)  # elements in 16 bytes, such units in an atom's row
        mn, k = np.meshgrid(np.arange(self.mn), np.arange(self.k), indexing="ij")
        # An atom is 8 rows of `width` units; rows run along mn if the elements are contiguous along k.
        row, column = (mn, k) if self.along_k else (k, mn)
        inside = row % 8 * width * 16 + column // unit % width * 16 + column % unit * self.size
        row, column = row // 8, column // (unit * width)
        rows, columns = row.max() + 1, column.max() + 1
        atom = 128 * width
        if self.k_first == self.along_k:
            row_stride, column_stride = columns * atom, atom
        else:
            row_stride, column_stride = atom, rows * atom
        address = inside + row * row_stride + column * column_stride
        if self.along_k:
            # Swizzled, an instruction's 32 bytes of k lie in one atom: the leading offset says nothing.
            return address, column_stride if self.swizzle == 0 else 16, row_stride
        if self.swizzle == 0:
            return address, row_stride, column_stride
        return address, column_stride, row_stride

    def image(self, values: np.ndarray, kind: str) -> np.ndarray:
        """Words, as shared memory holds them: whole multiples of 1024 bytes, gaps poisoned."""
        address = swizzled(self.layout()[0], self.swizzle)
        image = poisoned(-(-(address.max() + self.size) // 1024) * 1024, np.uint8)
        bits = encode(values, kind)
        image.view(bits.dtype)[address // self.size] = bits
        return image.view(np.uint32)

    def values(self, image: np.ndarray, kind: str) -> np.ndarray:
        bits = image.view(np.uint32 if self.size == 4 else np.uint16)
        return decode(bits[swizzled(self.layout()[0], self.swizzle) // self.size], kind)

    def descriptors(self) -> np.ndarray:
        """One for each 32 bytes' worth of k, of an image at address 0 (PTX ISA 9.7.15.5.1)."""
        address, leading, stride = self.layout()
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        fixed = int(leading) >> 4 << 16 | int(stride) >> 4 << 32 | mode << 62
        return np.array([fixed | int(a) >> 4 for a in address[0, :: 32 // self.size]], np.uint64)


def wgmma(
    kernel: str,
    n: int,
    steps: int,
    a: tuple[bool, int, bool] | None,  # along_k, swizzle, k_first; None: from registers
    b: tuple[bool, int, bool],
    kind: str = "bf16",
    d_kind: str = "f32",
    scale_d: int = 1,
    scale: int = 1,
    draw: Draw = integers,
    tolerance: float = 0.0,
) -> Probe:
    size = SIZES[kind]
    k = 32 // size * steps
    operand_a, operand_b = Operand(64, k, size, *(a or (True, 0, True))), Operand(n, k, size, *b)
    a_at = (fragment_a32 if kind == "tf32" else fragment_a16)(k, 128)
    d_at = (fragment_d if d_kind == "f32" else fragment_d16)(n, 128)

    def arguments(rng: np.random.Generator) -> list[Argument]:
        values = draw(rng, (64, k))
        image_b = operand_b.image(draw(rng, (n, k)), kind)
        d = to_registers(draw(rng, (64, n)), d_at, d_kind)
        descriptors = np.stack([operand_a.descriptors(), operand_b.descriptors()], axis=1)
        if a is None:
            first = [to_registers(values, a_at, kind)]
        else:
            image_a = operand_a.image(values, kind)
            first = [image_a, np.uint32(image_a.size)]
        d = d if scale_d else poisoned(d.shape, d.dtype)
        return [*first, image_b, np.uint32(image_b.size), descriptors, np.uint32(scale_d), d]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        left = to_matrix(arguments[0], a_at, kind) if a is None else operand_a.values(arguments[0], kind)
        d = scale * left @ operand_b.values(arguments[1 if a is None else 2], kind).T
        if scale_d:
            d += to_matrix(arguments[-1], d_at, d_kind)
        return [d[d_at] if tolerance else to_registers(d, d_at, d_kind)]

    def described(operand: tuple[bool, int, bool] | None) -> str:
        return "r" if operand is None else f"{'k' if operand[0] else 'mn'}{operand[1]}{'' if operand[2] else 'x'}"

    parts = [described(a), described(b), "" if scale_d else "zero", "random" if tolerance else ""]
    name = "_".join(["wgmma", kernel, *filter(None, parts)])
    outputs, shared = (5 if a is None else 6,), 1024 * 40
    return Probe(
        name, "wgmma.cu", kernel, arguments, expected, outputs, (1,), (128,), (1,), shared, "sm_90a", tolerance
    )


K0, K32, K64, K128 = ((True, swizzle, True) for swizzle in (0, 32, 64, 128))
MN0, MN32, MN64, MN128 = ((False, swizzle, True) for swizzle in (0, 32, 64, 128))
# The other order of atoms: the two offsets differ.
K0X, K32X, K64X, K128X, MN0X, MN32X, MN64X, MN128X = (
    (along_k, swizzle, False) for along_k in (True, False) for swizzle in (0, 32, 64, 128)
)

WGMMA = (
    *(wgmma("bf16_n64", 64, 8, a, b) for a, b in [(K0, K0X), (K32, K32X), (K64, K64X), (K128, K128X), (K0X, K128)]),
    wgmma("bf16_n64", 64, 8, K128, K128, scale_d=0),
    wgmma("bf16_n64", 64, 8, K128, K64, draw=normal, tolerance=2e-6),
    *(wgmma("bf16_n8", 8, 4, a, b) for a, b in [(K0X, K0), (K128, K128)]),
    *(wgmma("bf16_n64_tb", 64, 4, K128, b) for b in (MN0, MN0X, MN32, MN32X, MN64, MN64X, MN128)),
    *(wgmma("bf16_n64_ta", 64, 4, a, K128) for a in (MN0, MN0X, MN32, MN32X, MN64, MN64X, MN128)),
    *(wgmma("bf16_n128_ta_tb", 128, 4, a, b) for a, b in [(MN128, MN128), (MN128X, MN128X), (MN0X, MN64)]),
    *(wgmma("bf16_n256", 256, 2, a, b) for a, b in [(K0, K0), (K64, K64)]),
    wgmma("bf16_n32_minus_a", 32, 2, K64, K64, scale=-1),
    wgmma("bf16_n32_minus_b", 32, 2, K32, K32, scale=-1, scale_d=0),
    *(wgmma("f16_n64", 64, 4, x, x, "f16") for x in (K0, K128)),
    *(wgmma("f16_n128_tb", 128, 2, K64, b, "f16") for b in (MN128, MN128X)),
    *(wgmma("f16f16_n32", 32, 4, K128, K128, "f16", "f16", scale_d=scale_d) for scale_d in (0, 1)),
    wgmma("f16f16_n128", 128, 2, K64, K64, "f16", "f16"),
    *(wgmma("tf32_n8", 8, 4, x, x, "tf32") for x in (K0, K128)),
    *(wgmma("tf32_n64", 64, 8, x, x, "tf32") for x in (K0, K0X, K32, K64, K128, K128X)),
    *(wgmma("bf16_n64_rs", 64, 1, None, b, scale_d=scale_d) for b, scale_d in [(K0, 1), (K32, 0)]),
    *(wgmma("bf16_n128_rs_tb", 128, 1, None, b) for b in (MN128, MN32, MN0)),
    wgmma("bf16_n32_rs_minus", 32, 1, None, K32, scale=-1),
    wgmma("f16_n64_rs", 64, 1, None, K32, "f16"),
    wgmma("f16f16_n32_rs", 32, 1, None, K32, "f16", "f16"),
    wgmma("tf32_n32_rs", 32, 1, None, K32, "tf32"),
)

# ---- Bulk tensor copies ---------------------------------------------------------------------------------------------

TYPES = {"u8": np.uint8, "u16": np.uint16, "bf16": np.uint16, "u32": np.uint32, "f32": np.float32}


def box_bytes(tensor: TensorMap) -> int:
    return int(np.prod(tensor.box)) * tensor.array.itemsize


def offsets(tensor: TensorMap) -> np.ndarray:
    """Element of shared memory, counted from the start, at which each element of the box lies."""
    size = tensor.array.itemsize
    address = np.arange(np.prod(tensor.box)).reshape(tensor.box) * size
    return swizzled(address, tensor.swizzle) // size


def inside(tensor: TensorMap, start: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Which part of the array a box that starts at `start` (outermost first) has, and where the box has it."""
    lower = [max(s, 0) for s in start]
    upper = [min(s + b, d) for s, b, d in zip(start, tensor.box, tensor.array.shape)]
    return (
        tuple(slice(low, max(high, low)) for low, high in zip(lower, upper)),
        tuple(slice(low - s, max(high, low) - s) for low, high, s in zip(lower, upper, start)),
    )


def loaded(tensor: TensorMap, start: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """Shared memory, (elements,), after a load."""
    box = np.full(tensor.box, fill, tensor.array.dtype)
    source, target = inside(tensor, start)
    box[target] = tensor.array[source]
    shared = np.empty(box.size, box.dtype)
    shared[offsets(tensor)] = box
    return shared


def stored(tensor: TensorMap, start: tuple[int, ...], image: np.ndarray) -> np.ndarray:
    array = tensor.array.copy()
    target, source = inside(tensor, start)
    array[target] = image.view(array.dtype)[offsets(tensor)][source]
    return array


def random_array(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    if kind == "f32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, np.iinfo(TYPES[kind]).max, shape, TYPES[kind], endpoint=True)


@dataclass(frozen=True)
class Box:
    """Of an array `shape`; all dimensions in NumPy's order."""

    shape: tuple[int, ...]
    box: tuple[int, ...]
    start: tuple[int, ...]
    kind: str
    swizzle: int = 0

    def __str__(self) -> str:
        return f"{len(self.shape)}d_{self.kind}_s{self.swizzle}_at_" + "_".join(
            str(s).replace("-", "m") for s in self.start
        )

    def coordinates(self) -> list[np.int32]:
        return [np.int32(s) for s in reversed(self.start)]


def load(case: Box) -> Probe:
    def arguments(rng: np.random.Generator) -> list[Argument]:
        tensor = TensorMap(random_array(rng, case.shape, case.kind), case.box, case.kind, case.swizzle)
        size = box_bytes(tensor)
        return [tensor, *case.coordinates(), np.uint32(size), poisoned(size, np.uint8)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        return [loaded(arguments[0], case.start).view(np.uint8)]

    rank = len(case.shape)
    return Probe(f"tma_load_{case}", "tma.cu", f"load_{rank}d", arguments, expected, (rank + 2,), (1,), (64,), (1,),
                 16384, "sm_90a")  # fmt: skip


def store(case: Box) -> Probe:
    def arguments(rng: np.random.Generator) -> list[Argument]:
        tensor = TensorMap(poisoned(case.shape, TYPES[case.kind]), case.box, case.kind, case.swizzle)
        size = box_bytes(tensor)
        image = random_array(rng, (size // tensor.array.itemsize,), case.kind).view(np.uint8)
        return [tensor, *case.coordinates(), np.uint32(size), image]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        return [stored(arguments[0], case.start, arguments[-1])]

    rank = len(case.shape)
    return Probe(f"tma_store_{case}", "tma.cu", f"store_{rank}d", arguments, expected, (0,), (1,), (64,), (1,),
                 16384, "sm_90a")  # fmt: skip


def load_nan(kind: str) -> Probe:
    start = (-3, 36)

    def arguments(rng: np.random.Generator) -> list[Argument]:
        array = rng.standard_normal((20, 48)).astype(np.float32)
        tensor = TensorMap(bf16(array) if kind == "bf16" else array, (8, 16), kind, 32 if kind == "bf16" else 64, True)
        coordinates = [np.int32(s) for s in reversed(start)]
        return [tensor, *coordinates, np.uint32(box_bytes(tensor)), poisoned(128, np.float32)]

    def expected(arguments: list[Argument]) -> list[np.ndarray]:
        tensor = arguments[0]
        if kind == "bf16":
            return [from_bf16(loaded(tensor, start, 0x7FFF))]  # decoded, one NaN is as good as another
        return [loaded(tensor, start, np.nan)]

    return Probe(f"tma_load_nan_{kind}", "tma.cu", f"load_2d_{kind}", arguments, expected, (4,), (1,), (64,), (1,),
                 16384, "sm_90a")  # fmt: skip


def multicast_arguments(rng: np.random.Generator) -> list[Argument]:
    tensor = TensorMap(random_array(rng, (12, 64), "u16"), (8, 64), "u16", 128)
    size = box_bytes(tensor)
    return [tensor, np.int32(0), np.int32(-2), np.int32(8), np.uint32(size), poisoned((2, 2 * size), np.uint8)]


def multicast_expected(arguments: list[Argument]) -> list[np.ndarray]:
    both = np.concatenate([loaded(arguments[0], (y, 0)).view(np.uint8) for y in (-2, 6)])
    return [np.stack([both, both])]


BOXES = (
    *(Box((100,), (64,), (x,), "f32") for x in (8, -16, 60)),
    Box((4096,), (256,), (-1,), "u8"),
    *(
        Box((20, 40), (9, 24), start, "bf16")
        for start in [(4, 8), (-3, -5), (-8, 17), (17, -23), (17, 36), (30, 0), (-9, -24)]
    ),
    *(Box((20, 48), (16, 16), start, "bf16", 32) for start in [(0, 0), (-5, 40), (11, -7)]),
    *(Box((20, 48), (16, 16), start, "f32", 64) for start in [(3, 5), (-5, 40)]),
    *(Box((20, 160), (16, 128), start, "u8", 128) for start in [(3, 16), (11, -17)]),
    *(Box((20, 72), (16, 64), start, "bf16", 128) for start in [(2, 8), (9, 40), (-6, -40)]),
    *(Box((5, 6, 20), (2, 3, 8), start, "f32", 32) for start in [(1, 2, 4), (-1, 4, 15), (4, -2, -3)]),
    # Pixels of an image, channels innermost: the halo of a convolution.
    *(Box((2, 7, 9, 64), (1, 4, 5, 64), start, "bf16", 128) for start in [(0, -1, -1, 0), (1, 5, 6, 0), (1, 2, 3, 0)]),
    *(Box((2, 3, 4, 5, 32), (2, 2, 2, 3, 32), start, "u8", 32) for start in [(0, 0, 1, 1, 0), (-1, 2, -1, 4, 16)]),
)

TMA = (
    *map(load, BOXES),
    *map(store, BOXES),
    *map(load_nan, ("f32", "bf16")),
    Probe(
        "tma_multicast",
        "tma.cu",
        "multicast_2d",
        multicast_arguments,
        multicast_expected,
        (5,),
        (2,),
        (64,),
        (2,),
        16384,
        "sm_90a",
    ),
)

PROBES: tuple[Probe, ...] = (*MMA, *MATRICES, *WGMMA, *TMA)
