"""The backends: four kernels each, chosen or forced here. Hot paths never ask which one is running them."""

from refinenet_fast.backends.base import PLAIN_IN, PLAIN_OUT, Backend, WayIn, WayOut, rotated, select
from refinenet_fast.backends.choose import (
    BackendInfo,
    forces_reference,
    get,
    known_backends,
    list_backends,
    resolve,
    use_backend,
)

__all__ = [
    "PLAIN_IN",
    "PLAIN_OUT",
    "Backend",
    "BackendInfo",
    "WayIn",
    "WayOut",
    "forces_reference",
    "get",
    "known_backends",
    "list_backends",
    "resolve",
    "rotated",
    "select",
    "use_backend",
]
