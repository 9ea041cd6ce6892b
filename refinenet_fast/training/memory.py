"""How much memory a step of training takes, counted without taking it."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Within the block, the bytes of all tensors that operations have returned and that still live.

    What an operation needs while it runs, and returns to no one, is not counted.

    Attributes:
        now: Bytes at this moment.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in given:
                self._count(t.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 or float16, or none for another precision."""
    return torch.autocast(device, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def step_bytes(model: nn.Module, batch: int, crop: tuple[int, int], precision: str = "float32") -> int:
    """The peak of a forward and backward pass beside the weights: what backward needs, and gradients.

    Counted with tensors that have sizes only, as on a CPU.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            k: torch.empty_like(v, device="cpu").requires_grad_(v.requires_grad)
            for k, v in (*model.named_parameters(), *model.named_buffers())
        }
        images = torch.empty(batch, 3, *crop, dtype=next(model.parameters()).dtype)
        labels = torch.empty(batch, *crop, dtype=torch.int64)
        with LiveBytes() as live:
            with autocast("cpu", precision):
                logits = torch.func.functional_call(model, state, (images,))
            F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    return live.peak
