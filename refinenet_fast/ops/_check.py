"""What the public ops accept, and the sentences they refuse the rest with."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**20  # pixels on a side: sizes beyond it overflow PyTorch's strides, or are a mistake
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(value: Any, argument: str, rank: int) -> Tensor:
    """``value`` if it is a floating tensor of that rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{argument}: expected a floating dtype, one of {known}, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{argument}: expected a dense tensor (torch.strided), got a {layout} one")
    if value.dim() != rank:
        raise ValueError(f"{argument}: expected {rank} dimensions, got shape {tuple(value.shape)}")
    return value


def image(value: Any, argument: str) -> Tensor:
    """``value`` if it is a floating (N, C, H, W) with C, H, W >= 1; N may be 0."""
    x = tensor(value, argument, rank=4)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{argument}: expected (N, C, H, W) with C, H, W >= 1, got {tuple(x.shape)}")
    return x


def weight(
    value: Any,
    argument: str,
    x: Tensor,  # (N, C, H, W): what it is convolved with
    channels: int | None = None,
    kernels: tuple[int, ...] = (1, 3),
) -> Tensor:
    """``value`` if it is a (K, C, R, R) weight, R in ``kernels``, for ``x``; of ``channels`` inputs instead of C."""
    w = tensor(value, argument, rank=4)
    channels = x.shape[1] if channels is None else channels
    k, c, rows, columns = w.shape
    if rows != columns or rows not in kernels or k < 1:
        sizes = " or ".join(f"{r}x{r}" for r in kernels)
        raise ValueError(f"{argument}: expected a {sizes} kernel, (K, {channels}, R, R), got {tuple(w.shape)}")
    if c != channels:
        raise ValueError(f"{argument}: expected {channels} input channels, got {c} (shape {tuple(w.shape)})")
    _goes_with(w, argument, x)
    return w


def bias(
    value: Any,
    argument: str,
    w: Tensor,  # (K, C, R, R): whose result it is added to
    x: Tensor,
) -> Tensor | None:
    """``value`` if it is None or a (K,) bias."""
    if value is None:
        return None
    b = tensor(value, argument, rank=1)
    if b.shape[0] != w.shape[0]:
        raise ValueError(f"{argument}: expected shape ({w.shape[0]},), got {tuple(b.shape)}")
    _goes_with(b, argument, x)
    return b


def flag(value: Any, argument: str) -> bool:
    """``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected a bool, got {value!r}")
    return value


def choice(value: Any, argument: str, known: tuple[str, ...]) -> str:
    """``value`` if it is one of the ``known`` words."""
    if value not in known:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def sequence(value: Any, argument: str) -> list[Any]:
    """``value`` as a list, if it is a list or tuple and not empty."""
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence | torch.nn.ParameterList):
        raise TypeError(f"{argument}: expected a list or tuple, got {type(value).__name__}")
    if not len(value):
        raise ValueError(f"{argument}: expected at least one entry, got an empty {type(value).__name__}")
    return list(value)


def as_many(value: Any, argument: str, count: int, of: str) -> list[Any]:
    """``value`` as a list of ``count`` entries; None stands for that many Nones."""
    if value is None:
        return [None] * count
    entries = sequence(value, argument)
    if len(entries) != count:
        raise ValueError(f"{argument}: expected {count} entries, one for each of {of}, got {len(entries)}")
    return entries


def size(value: Any, argument: str) -> tuple[int, int]:
    """``value`` if it is a pair (H, W) of positive integers."""
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{argument}: expected a pair (H, W), got {value!r}")
    if not all(_is_integer(side) for side in value):
        raise TypeError(f"{argument}: expected a pair of integers, got {value!r}")
    height, width = (integer(side, argument) for side in value)
    if min(height, width) < 1 or max(height, width) > LARGEST:
        raise ValueError(f"{argument}: expected H, W >= 1 and <= {LARGEST}, got {tuple(value)}")
    return height, width


def integer(value: Any, argument: str) -> Any:
    """``value`` if it is an integer, Python's, NumPy's or symbolic; not a bool."""
    if not _is_integer(value):
        raise TypeError(f"{argument}: expected an integer, got {value!r}")
    return value if isinstance(value, torch.SymInt) else int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def same_device_and_dtype(other: Tensor, argument: str, x: Tensor, first: str) -> None:
    """Raise unless ``other`` is on the device and of the dtype of ``x``."""
    if other.device != x.device:
        raise ValueError(f"{argument}: expected device {x.device}, that of {first}, got {other.device}")
    if other.dtype != x.dtype:
        raise TypeError(f"{argument}: expected {x.dtype}, the dtype of {first}, got {other.dtype}")


def _goes_with(parameter: Tensor, argument: str, x: Tensor) -> None:
    """Parameters are on the activations' device, of their dtype or float32 beside half-precision activations."""
    if parameter.device != x.device:
        raise ValueError(f"{argument}: expected device {x.device}, that of the activations, got {parameter.device}")
    half = x.dtype in (torch.float16, torch.bfloat16)
    if parameter.dtype != x.dtype and not (half and parameter.dtype == torch.float32):
        allowed = f"{x.dtype} or torch.float32" if half else f"{x.dtype}"
        raise TypeError(f"{argument}: expected {allowed} beside activations of {x.dtype}, got {parameter.dtype}")
