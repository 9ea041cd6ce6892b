"""One process or many, by torchrun's environment: sums over ranks, and what rank 0 decides for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from refinenet_fast.training.files import BadInput

T = TypeVar("T")


class Told(BadInput):
    """What the first rank has raised and says, on the others."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise where a rank has other ``values``, which have the same names on all.

        Raises:
            BadInput: Names the first that differs.
            Told: On the other ranks.
        """
        everywhere = self.gather(dict(values))
        for rank, theirs in enumerate(everywhere):
            for name, expected in everywhere[0].items():
                if theirs[name] != expected:
                    message = f"{name}: expected {expected!r} on every rank, got {theirs[name]!r} on rank {rank}"
                    advice = "all machines need the same options, the same data, and --out on a disk that they share"
                    raise (BadInput if self.first else Told)(f"{message}; {advice}")

    def on_each(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns on every rank, on every rank; what one raises as BadInput, all raise.

        Raises:
            Told: On the other ranks than the first.
        """
        result: Any
        try:
            result = work()
        except BadInput as error:
            result = error
        results = self.gather(result)
        for found in results:
            if isinstance(found, BadInput):
                raise found if self.first else Told(str(found))
        return results

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, for all ranks; what it raises as BadInput, all raise.

        Raises:
            Told: On the other ranks.
        """
        return self.on_each(lambda: work() if self.first else None)[0]


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone.

    Args:
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``.

    Raises:
        BadInput: There is no such device.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"device: expected auto, cpu, cuda or cuda:<n>, got {device!r}") from error
    if place.type == "cuda":
        place = torch.device("cuda", local if world > 1 else place.index or 0)
        if place.index >= torch.cuda.device_count():
            raise BadInput(f"device: expected one of {torch.cuda.device_count()} GPUs, got {place}")
        torch.cuda.set_device(place)
    if world == 1:
        yield Ranks(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, place)
    finally:
        dist.destroy_process_group()


def default_workers(group: Ranks) -> int:
    """Processes that load data for one rank: a core each, at most 8."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // here))
