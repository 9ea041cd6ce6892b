"""A launch: a kernel, a grid, and arguments over NumPy arrays."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emulator import (
    arithmetic,
    barriers,
    bulk,
    conversions,
    copies,
    data,
    floats,
    mbarrier,
    tensorcore,
    tensors,
    warps,
    wgmma,
)
from emulator.access import granule
from emulator.clocks import Clocks
from emulator.errors import EmulatorError, Fault
from emulator.machine import Machine
from emulator.memory import GlobalMemory, SharedMemory
from emulator.parser import Kernel
from emulator.registers import Lanes
from emulator.scheduler import run
from emulator.shadow import Shadow
from emulator.tensormap import TensorMap
from emulator.unit import LOCKSTEP, Schedule, Unit

# They fill the table of opcodes.
FAMILIES = (
    *(arithmetic, floats, conversions, data, warps, barriers),
    *(mbarrier, copies, bulk, tensors, tensorcore, wgmma),
)
BUDGET = 1_000_000  # basic blocks that a group of lanes may run
THREADS = 4_000_000  # of a grid
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_90a": 232_448, "sm_100": 232_448, "sm_100a": 232_448}


@dataclass(frozen=True)
class Struct:
    """A parameter passed by value: ``values`` packed as ``layout`` (Python's struct), arrays among them as pointers."""

    layout: str
    values: tuple[object, ...]


def emulate(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    args: Sequence[object],
    *,
    cluster: Sequence[int] = (),
    shared: int = 0,
    schedule: Schedule = LOCKSTEP,
    unchecked: Collection[str] = (),
    memory: GlobalMemory | None = None,
    last: int = 0,
) -> None:
    """Run ``grid`` x ``block`` threads.

    Args:
        args: One per parameter: NumPy arrays for pointers (changed in place), numbers, TensorMap, Struct, bytes.
        cluster: Blocks of a cluster; by default what the kernel was compiled for, else one.
        shared: Bytes of dynamic shared memory.
        unchecked: "proxies": missing proxy fences, "registers": what wgmma has in flight; to go on past such a finding.
        memory: Where the arrays' addresses are made up; by default a new one.
        last: Of the clusters, this many, the last ones, run alone; 0: all do.

    Raises:
        EmulatorError: The launch does not fit the kernel, or the kernel does what it must not.
    """
    sizes = [
        _three(kernel, n, s) for n, s in (("grid", grid), ("block", block), ("cluster", cluster or kernel.cluster))
    ]
    _fits(kernel, sizes, last)
    memory = GlobalMemory() if memory is None else memory
    maps: list[TensorMap] = []
    parameters = np.frombuffer(_pack(kernel, args, memory, maps), np.uint8)
    machine = Machine(kernel, memory, shared, BUDGET)
    if unknown := sorted(Machine.unknown(kernel)):
        names = ", ".join(unknown)
        warnings.warn(f"{kernel.name}: raises if it gets to an opcode that is not known: {names}", stacklevel=2)
    limit = SHARED_LIMIT.get(kernel.target, 101_376)
    if machine.shared_bytes > limit:
        raise EmulatorError(
            f"{kernel.name}: {machine.shared_bytes} bytes of shared memory; {kernel.target} has {limit}"
        )
    memory.begin(watched=not machine.talks() and not last)
    if machine.uses("wgmma", "setmaxnreg"):
        schedule = replace(schedule, lanes=128)  # what has to run together, and no more
    rng = np.random.default_rng(schedule.seed)
    units = _units(sizes, 1 if machine.meets() else max(1, schedule.lanes // _padded(sizes[1])), last)
    with np.errstate(all="ignore"):
        for index in rng.permutation(len(units)):
            unit = _unit(machine, units[index], sizes, memory, parameters, schedule, rng)
            unit.state["maps"], unit.unchecked = maps, unchecked
            if unit.shadow is not None:
                unit.shadow.proxies = "proxies" not in unchecked
            run(machine, unit)


# -- what a launch has to fit ------------------------------------------------------------------------------------------


def _three(kernel: Kernel, name: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    full = (*sizes, 1, 1, 1)[:3]
    if len(sizes) > 3 or min(full) < 1:
        raise EmulatorError(f"{kernel.name}: {name}: expected one to three sizes >= 1, got {tuple(sizes)}")
    return full


def _fits(kernel: Kernel, sizes: list[tuple[int, int, int]], last: int) -> None:
    grid, block, cluster = sizes
    threads = int(np.prod(block))
    if threads > 1024:
        raise EmulatorError(f"{kernel.name}: block: expected at most 1024 threads, got {block}")
    if kernel.threads and (*kernel.threads, 1, 1)[:3] != block:
        raise EmulatorError(f"{kernel.name}: block: expected {kernel.threads}, as it was compiled for, got {block}")
    if kernel.most_threads and threads > kernel.most_threads:
        raise EmulatorError(
            f"{kernel.name}: block: expected at most {kernel.most_threads} threads (.maxntid), got {block}"
        )
    if max(grid[1:]) > 65_535 or block[2] > 64:
        raise EmulatorError(f"{kernel.name}: expected grid.y, grid.z <= 65535 and block.z <= 64, got {grid}, {block}")
    if kernel.cluster and (*kernel.cluster, 1, 1)[:3] != cluster:
        raise EmulatorError(f"{kernel.name}: cluster: expected {kernel.cluster}, as it was compiled for, got {cluster}")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise EmulatorError(f"{kernel.name}: grid: expected multiples of the cluster {cluster}, got {grid}")
    if int(np.prod(cluster)) > 1 and kernel.target < "sm_90" and len(kernel.target) < 6:
        raise EmulatorError(f"{kernel.name}: cluster: expected one block on {kernel.target}, got {cluster}")
    if int(np.prod(cluster)) > 16:
        raise EmulatorError(f"{kernel.name}: cluster: expected at most 16 blocks, got {cluster}")
    if threads * (last * int(np.prod(cluster)) or int(np.prod(grid))) > THREADS:
        raise EmulatorError(f"{kernel.name}: grid: {grid} x {block} exceeds the budget of {THREADS} threads")


def _pack(kernel: Kernel, args: Sequence[object], memory: GlobalMemory, maps: list[TensorMap]) -> bytes:
    """The kernel's parameters as they lie in memory."""
    if len(args) != len(kernel.parameters):
        raise EmulatorError(f"{kernel.name}: expected {len(kernel.parameters)} arguments, got {len(args)}")
    packed = bytearray(kernel.parameter_bytes)
    for (name, (offset, size)), value in zip(kernel.parameters.items(), args, strict=True):
        given = _bytes(name, size, value, memory, maps)
        if len(given) != size:
            what = f"{len(given)} ({type(value).__name__})"
            raise EmulatorError(f"{kernel.name}: parameter {name}: expected {size} bytes, got {what}")
        packed[offset : offset + size] = given
    return bytes(packed)


def _bytes(name: str, size: int, value: object, memory: GlobalMemory, maps: list[TensorMap]) -> bytes:
    match value:
        case TensorMap():
            maps.append(tensors.checked(name, value))
            value.address(memory)
            return tensors.handle(len(maps) - 1)
        case Struct():
            try:
                return struct.pack("<" + value.layout, *(_address(name, v, memory) for v in value.values))
            except struct.error as error:
                raise EmulatorError(f"parameter {name}: layout {value.layout!r}: {error}") from None
        case bytes():
            return value
        case np.ndarray():
            return struct.pack("<Q", memory.add(name, value))
        case np.generic():
            return value.tobytes()
        case bool() | int():
            if not -(1 << 8 * size - 1) <= value < 1 << 8 * size:
                raise EmulatorError(f"parameter {name}: expected a number of {size} bytes, got {value}")
            return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        case float():
            return struct.pack("<f" if size == 4 else "<d", value)
    raise EmulatorError(f"parameter {name}: expected an array, a number, a TensorMap, a Struct or bytes, got {value!r}")


def _address(name: str, value: object, memory: GlobalMemory) -> object:
    return memory.add(name, value) if isinstance(value, np.ndarray) else value


# -- units -------------------------------------------------------------------------------------------------------------


def _padded(block: tuple[int, int, int]) -> int:
    """A block's threads, rounded up to whole warps."""
    return -(-int(np.prod(block)) // 32) * 32


def _units(sizes: list[tuple[int, int, int]], together: int, last: int) -> list[np.ndarray]:
    """(B, 3) ctaid of the blocks of every unit: a cluster, or ``together`` blocks that cannot meet."""
    grid, _, cluster = sizes
    counts = [g // c for g, c in zip(grid, cluster, strict=True)]
    end = int(np.prod(counts))
    first = _places(np.arange(max(0, end - last) if last else 0, end), counts)
    clusters = first[:, None, :] * np.array(cluster) + _places(np.arange(int(np.prod(cluster))), cluster)
    return [clusters[i : i + together].reshape(-1, 3) for i in range(0, len(clusters), together)]


def _places(numbers: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(B, 3) of (B,): x, y, z, of which x is the fastest."""
    return np.stack(np.unravel_index(numbers, sizes[::-1])[::-1], -1)


def _unit(
    machine: Machine,
    blocks: np.ndarray,  # (B, 3)
    sizes: list[tuple[int, int, int]],
    memory: GlobalMemory,
    parameters: np.ndarray,
    schedule: Schedule,
    rng: np.random.Generator,
) -> Unit:
    bx, by, bz = sizes[1]
    padded, count = _padded(sizes[1]), bx * by * bz
    linear = np.arange(padded)
    tid = np.stack([linear % bx, linear // bx % by, linear // (bx * by)], axis=1)
    threads = np.concatenate([np.repeat(blocks, padded, axis=0), np.tile(tid, (len(blocks), 1))], axis=1)
    shared = SharedMemory(len(blocks), machine.shared_bytes)
    unit = Unit(
        threads.astype(np.uint32),
        np.tile(linear < count, len(blocks)),
        np.repeat(np.arange(len(blocks)), padded),
        sizes,
        memory,
        parameters,
        shared,
        schedule,
        rng,
    )
    if machine.meets():
        unit.clocks = Clocks(len(threads), unit.name)
        width = granule(machine.kernel)
        unit.shadow = Shadow(unit.clocks, len(shared.data) // width, width, shared.size // width)
        unit.shadow.describe = machine.place
    step = min(schedule.lanes, padded) if machine.meets() else schedule.lanes
    for start in range(0, len(threads), padded) if machine.meets() else [0]:
        end = start + padded if machine.meets() else len(threads)
        for first in range(start, end, step):
            lanes = Lanes(machine.kernel, unit, np.arange(first, min(first + step, end)))
            lanes.exited = ~unit.exists[lanes.threads]
            lanes.live = int(unit.exists[lanes.threads].sum())
            if machine.local_bytes:
                lanes.locals = np.zeros((lanes.count, machine.local_bytes), np.uint8)
                lanes.local_valid = np.zeros(lanes.locals.shape, bool)
            unit.groups.append(lanes)
    return unit


__all__ = ["Fault", "Schedule", "Struct", "emulate"]
