"""All probes of single instruction families."""

from __future__ import annotations

from probes import Probe, probes_block, probes_memory, probes_scalar, probes_tensor

PROBES: tuple[Probe, ...] = (
    *probes_tensor.PROBES,
    *probes_block.PROBES,
    *probes_memory.PROBES,
    *probes_scalar.PROBES,
)
