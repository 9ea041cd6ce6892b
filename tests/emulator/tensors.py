"""Tensor copies: boxes of tensors, by tensor maps (TMA; PTX ISA, 9.7.9.25.5)."""

from __future__ import annotations

import struct

import numpy as np

from emulator.access import addresses, operand_number, shared
from emulator.bulk import begin_store, destinations, each_lane, fill
from emulator.errors import EmulatorError, Fault
from emulator.memory import PARAMETERS, SHARED_FIRST
from emulator.parser import Address, Instruction, Operand
from emulator.registers import Active, Lanes
from emulator.table import executes
from emulator.tensormap import SIZES, TensorMap, swizzled

MAGIC = b"tensor map\0\0\0\0\0\0"


def checked(name: str, given: TensorMap) -> TensorMap:
    """A tensor map that CUDA would make, or an error that says why not (cuTensorMapEncodeTiled)."""
    array, box, size = given.array, given.box, SIZES.get(given.kind, 0)
    said = None
    if not size or array.itemsize != size:
        said = f"elements of {array.itemsize} bytes are no {given.kind}"
    elif not 1 <= array.ndim <= 5 or len(box) != array.ndim:
        said = f"expected one to five dimensions and a box of as many, got {array.shape} and {box}"
    elif not all(1 <= b <= 256 for b in box):
        said = f"expected a box of 1 to 256 elements in each dimension, got {box}"
    elif box[-1] * size % 16:
        said = f"expected the box's rows to be multiples of 16 bytes, got {box[-1] * size}"
    elif array.strides[-1] != size or any(s % 16 or s < 0 for s in array.strides[:-1]):
        said = f"expected contiguous rows and strides that are multiples of 16 bytes, got {array.strides}"
    elif array.ctypes.data % 16:
        said = f"expected an address that 16 bytes divide, got one {array.ctypes.data % 16} behind"
    elif given.swizzle and box[-1] * size > given.swizzle:
        said = f"expected rows of at most {given.swizzle} bytes under that swizzle, got {box[-1] * size}"
    elif given.swizzle and box[-1] * size != given.swizzle:
        said = f"rows of {box[-1] * size} bytes, less than the swizzle's {given.swizzle}, are not modelled"
    elif given.nan_fill and given.kind not in ("f16", "bf16", "f32", "tf32", "f64"):
        said = f"NaN fills floating-point elements, not {given.kind}"
    if said:
        raise EmulatorError(f"tensor map {name}: {said}")
    return given


def handle(index: int) -> bytes:
    """What stands in for the 128 opaque bytes of a tensor map."""
    return MAGIC + struct.pack("<Q", index) + bytes(104)


def _tensor_map(at: Instruction, lanes: Lanes, alone: Active, operand: Address) -> TensorMap:
    where = int(addresses(Address(operand.base, operand.offset), lanes, alone)[0])
    if where % 64:
        raise Fault(f"tensor map at {where:#x}: not aligned to 64 bytes")
    if PARAMETERS <= where < PARAMETERS + len(lanes.unit.parameters):
        raw = lanes.unit.parameters[where - PARAMETERS :][:24].tobytes()
    else:
        raw = lanes.unit.memory.load(where + np.arange(0, 24, 8), 8).tobytes()
    if raw[:16] != MAGIC:
        raise Fault(f"there is no tensor map at {where:#x}")
    maps = lanes.unit.state["maps"]
    assert isinstance(maps, list)
    return maps[struct.unpack("<Q", raw[16:])[0]]


def _box(at: Instruction, lanes: Lanes, alone: Active, operand: Operand) -> tuple[TensorMap, np.ndarray, np.ndarray]:
    """(map, (E,) the box's elements as bytes from the array's first, (E,) which of them exist)."""
    assert isinstance(operand, Address) and operand.coordinates is not None
    tensor = _tensor_map(at, lanes, alone, operand)
    rank = int(at.modifiers[3][0])
    if rank != tensor.array.ndim or len(operand.coordinates.elements) != rank:
        raise Fault(f"copies {rank} dimensions of a tensor map of {tensor.array.ndim}")
    start = [int(operand_number(c, lanes, alone, "s32")[0]) for c in reversed(operand.coordinates.elements)]
    position, inside = np.zeros(tensor.box, np.int64), np.ones(tensor.box, bool)
    array = tensor.array
    for axis, (first, size, length) in enumerate(zip(start, tensor.box, array.shape, strict=True)):
        shape = [-1 if k == axis else 1 for k in range(rank)]
        along = (first + np.arange(size)).reshape(shape)
        position = position + np.clip(along, 0, length - 1) * array.strides[axis]
        inside = inside & (along >= 0) & (along < length)
    return tensor, position.ravel(), inside.ravel()


def _layout(lanes: Lanes, index: int, tensor: TensorMap) -> np.ndarray:
    """(E * bytes,) indices into shared memory of a box that begins at an index, swizzled by their addresses."""
    size = lanes.unit.shared.size
    block, inside = divmod(index, size)
    if (inside + SHARED_FIRST) % 128:
        raise Fault(f"shared address {inside + SHARED_FIRST:#x} is not aligned to 128 bytes")
    total = int(np.prod(tensor.box)) * SIZES[tensor.kind]
    where = swizzled(inside + SHARED_FIRST + np.arange(total), tensor.swizzle) - SHARED_FIRST
    if where.max() >= lanes.unit.shared.used:
        raise Fault(f"a box of {total} bytes at byte {inside} of {lanes.unit.shared.used} is out of bounds")
    return block * size + where


def _outside(tensor: TensorMap) -> np.ndarray:
    """The bytes of an element that lies outside."""
    size = SIZES[tensor.kind]
    if not tensor.nan_fill:
        return np.zeros(size, np.uint8)
    bits = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "tf32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
    return np.frombuffer(bits[tensor.kind].to_bytes(size, "little"), np.uint8)


@executes("cp.async.bulk.tensor", section="9.7.9.25.5.2", blocks=True)
def _tensor(at: Instruction, lanes: Lanes, active: Active) -> None:
    if any(m.startswith("im2col") or m.startswith("tile:") for m in at.modifiers):
        raise Fault("only tiled tensor copies are known")
    for lane, alone in each_lane(active, lanes.count):
        if at.modifiers[4] == "global":
            _store_tensor(at, lanes, lane, alone)
        else:
            _load_tensor(at, lanes, lane, alone)


def _load_tensor(at: Instruction, lanes: Lanes, lane: int, alone: Active) -> None:
    to, source, *rest = at.operands
    unit, (tensor, position, inside) = lanes.unit, _box(at, lanes, alone, source)
    size, outside = SIZES[tensor.kind], _outside(tensor)

    where = tensor.address(unit.memory) + position[inside]
    blocks = np.full(len(where), lanes.grid_block[lane])

    def fetch() -> np.ndarray:
        elements = np.tile(outside, (len(position), 1))
        elements[inside] = unit.memory.load(where, size, blocks)
        return elements.ravel()

    for index, barrier in destinations(at, lanes, lane, alone, to, rest, 16):
        fill(unit, int(lanes.threads[lane]), barrier, _layout(lanes, index, tensor), fetch)


def _store_tensor(at: Instruction, lanes: Lanes, lane: int, alone: Active) -> None:
    to, source, *_ = at.operands
    unit, (tensor, position, inside) = lanes.unit, _box(at, lanes, alone, to)
    size = SIZES[tensor.kind]
    first = addresses(source, lanes, alone)
    index = int(shared(lanes, np.array([lane]), first, 1, False)[0])
    cells = _layout(lanes, index, tensor)

    where = tensor.address(unit.memory) + position[inside]
    blocks = np.full(len(where), lanes.grid_block[lane])

    def store(values: np.ndarray) -> None:
        unit.memory.store(where, values.reshape(-1, size)[inside], blocks)

    begin_store(unit, cells, int(lanes.threads[lane]), store, cells.reshape(-1, size)[inside].ravel())
