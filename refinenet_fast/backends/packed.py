"""Weights in a layout of the backend's own, found again by their contents."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from refinenet_fast import _native

VARIABLE = "REFINENET_FAST_PACKED_MB"


class PackedWeights:
    """A cache of packed weights, the least recently used leaving first.

    The key is a 64-bit hash of the contents beside shape, strides and dtype: an address and a version counter miss
    writes through ``.data`` and NumPy, and addresses come back after a free. Hashing reads the weights once.

    Args:
        capacity: Bytes kept at most; by default ``REFINENET_FAST_PACKED_MB`` megabytes, 2048 where that is not set.
            RefineNet-101's decoder has 300 MB of weights in float32.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = _capacity_from_environment() if capacity is None else capacity
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        weight: Tensor,  # (K, C, R, R)
        dtype: torch.dtype,
        layout: str,
        pack: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """``pack(weight.to(dtype))``, from the cache if the same contents were packed to ``layout`` before."""
        weight = weight.resolve_neg()
        dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
        weight = weight if dense else weight.contiguous()
        size = weight.numel() * weight.element_size()
        assert _native._C is not None
        contents = _native._C.content_hash(_native.pointer(weight), size, torch.get_num_threads())
        key = (contents, weight.shape, weight.stride(), weight.dtype, dtype, layout)
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return found[0]
        packed = pack(weight.to(dtype))
        with self._lock:
            # oneDNN's layout tells no size; it is about that of the weights.
            opaque = packed.layout is not torch.strided
            self._insert(key, packed, (weight if opaque else packed).numel() * dtype.itemsize)
        return packed

    def _insert(self, key: Hashable, packed: Tensor, size: int) -> None:
        if key in self._entries or size > self.capacity:  # another thread was faster; it would push out all others
            return
        self._entries[key] = packed, size
        self.bytes += size
        while self.bytes > self.capacity:
            self.bytes -= self._entries.popitem(last=False)[1][1]


def _capacity_from_environment() -> int:
    megabytes = os.environ.get(VARIABLE) or "2048"
    if not megabytes.isdecimal():
        raise ValueError(f"{VARIABLE}: expected a whole number of megabytes, got {megabytes!r}")
    return int(megabytes) << 20
