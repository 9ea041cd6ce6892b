"""Runs a probe in the emulator and holds its outputs to what they have to be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import golden
from emulator import Schedule, TensorMap, emulate
from emulator.compilers import one
from emulator.parser import Kernel
from probes import Argument, Probe

if TYPE_CHECKING:
    from probes.triton_launch import TritonProbe

FOLDER = Path(__file__).parent
SCHEDULES = {
    "blocks in lockstep, copies early": Schedule(1024, 0, "early"),
    "warps, copies late": Schedule(32, 1, "late"),
    "warps, copies shuffled": Schedule(32, 2, "shuffled"),
}


def arguments_of(probe: Probe | TritonProbe) -> list[Argument]:
    """The same at every call."""
    return probe.arguments(np.random.default_rng(0))


def array_of(argument: Argument) -> np.ndarray:
    return argument.array if isinstance(argument, TensorMap) else np.asarray(argument)


def emulated(probe: Probe, schedule: Schedule, text: str = "", name: str = "") -> list[np.ndarray]:
    """A CUDA probe's outputs; ``text`` in place of its source, ``name`` in place of its kernel's."""
    kernel = one(FOLDER / probe.source, probe.arch, name or probe.kernel, text)
    arguments = arguments_of(probe)
    emulate(kernel, probe.grid, probe.block, arguments, cluster=probe.cluster, shared=probe.shared, schedule=schedule)
    return [array_of(arguments[k]) for k in probe.outputs]


def emulated_triton(
    probe: TritonProbe, kernel: Kernel, metadata: dict, schedule: Schedule, unchecked: Collection[str] = ()
) -> list[np.ndarray]:
    """A Triton probe's outputs."""
    from probes.triton_launch import launch_arguments, launch_shape

    arguments = arguments_of(probe)
    grid, block, cluster = launch_shape(probe, metadata)
    given = launch_arguments(probe, metadata, arguments)
    options = {"cluster": cluster, "shared": metadata["shared"], "schedule": schedule, "unchecked": unchecked}
    emulate(kernel, grid, block, given, **options)
    return [array_of(arguments[k]) for k in probe.outputs]


def wrong(probe: Probe | TritonProbe, outputs: Sequence[np.ndarray]) -> str:
    """What is wrong with outputs; nothing: ""."""
    for position, got, want in zip(probe.outputs, outputs, probe.expected(arguments_of(probe)), strict=True):
        agrees, words = golden.compare(got, want, probe.tolerance)
        if not agrees:
            return f"result: output {position}: {words}"
    return ""
