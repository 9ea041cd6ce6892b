"""Floating point beyond the four operations (PTX ISA, 9.7.3 and 9.7.4).

The hardware's approximations (``.approx``, ``.full``) are computed exactly and rounded once: within their documented
error, not their bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emulator.arithmetic import rounded
from emulator.table import computes


def _function(name: str, section: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    def compute(modifiers: tuple[str, ...], a: np.ndarray) -> np.ndarray:
        return rounded(modifiers, function(a.astype(np.float64)))

    computes(name, section)(compute)


_function("rcp", "9.7.3.13", lambda a: 1 / a)
_function("sqrt", "9.7.3.15", np.sqrt)
_function("rsqrt", "9.7.3.16", lambda a: 1 / np.sqrt(a))
_function("sin", "9.7.3.18", np.sin)
_function("cos", "9.7.3.19", np.cos)
_function("lg2", "9.7.3.20", np.log2)
_function("ex2", "9.7.3.21, 9.7.4.10", np.exp2)
_function("tanh", "9.7.3.22, 9.7.4.9", np.tanh)


@computes("copysign", "9.7.3.2")
def _copysign(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sign of ``a`` with the magnitude of ``b``."""
    return np.copysign(b, a)


@computes("testp", "9.7.3.1")
def _testp(modifiers: tuple[str, ...], a: np.ndarray) -> np.ndarray:
    tiny = np.finfo(a.dtype).tiny
    tests: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }
    return tests[modifiers[0]](a)
