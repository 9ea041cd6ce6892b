"""Vector clocks: what each thread knows that others, and asynchronous operations, have finished.

Agents are threads, and whatever else writes or reads memory on its own: a thread's cp.async copies, the bulk copies
that signal one mbarrier, a thread's bulk groups, a warpgroup's wgmma. Time passes per warp, at releases; an agent that
is not a thread counts its groups or phases instead. ``seen[t, a]`` is the time of agent ``a`` up to which thread ``t``
knows what it did; ``proxied[t, a]`` the same for writes through the generic proxy as the async proxy sees them, which
only ``fence.proxy.async`` on the way there moves (PTX ISA, 8.9.1.3, causality and proxies; FastTrack, Flanagan and
Freund, PLDI 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

ALWAYS = np.iinfo(np.int32).max  # a thread always knows what itself did


@dataclass
class Clock:
    """What a barrier carries from those who arrive to those who wait."""

    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # (A,)
    proxied: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # (A,)

    def join(self, other: Clock) -> None:
        self.seen, self.proxied = _join(self.seen, other.seen), _join(self.proxied, other.proxied)


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if len(a) < len(b):
        a, b = b, a
    joined = a.copy()
    np.maximum(joined[: len(b)], b, out=joined[: len(b)])
    return joined


class Clocks:
    """The clocks of a unit of ``threads`` threads, a multiple of 32."""

    def __init__(self, threads: int, name: Callable[[int], str]) -> None:
        self.threads, self._name = threads, name
        self.now = np.ones(threads // 32, np.int32)  # of each warp
        self.seen = np.zeros((threads, threads), np.int32)  # (T, A)
        self.seen[np.arange(threads), np.arange(threads)] = ALWAYS
        self.proxied = np.zeros((threads, threads), np.int32)  # (T, A)
        self.asynchronous = np.zeros(threads, bool)  # (A,): writes through the async proxy
        self.columns: dict[Hashable, int] = {}
        self.texts: dict[int, str] = {}
        self.count = threads

    def agent(self, key: Hashable, text: str, asynchronous: bool, count: int = 1) -> int:
        """The first of ``count`` agents' columns, new ones at the first call with a key."""
        found = self.columns.get(key)
        if found is not None:
            return found
        first = self.columns[key] = self.count
        self.count += count
        if self.count > self.seen.shape[1]:
            more = max(self.count, self.seen.shape[1] + 64) - self.seen.shape[1]
            grown = np.zeros((self.threads, more), np.int32)
            self.seen, self.proxied = np.hstack([self.seen, grown]), np.hstack([self.proxied, grown])
            self.asynchronous = np.concatenate([self.asynchronous, np.zeros(more, bool)])
        self.asynchronous[first : first + count] = asynchronous
        for column in range(first, first + count):
            self.texts[column] = text if count == 1 else f"{text} of {self._name(column - first)}"
        return first

    def text(self, agent: int) -> str:
        return self._name(agent) if agent < self.threads else self.texts[agent]

    def release(self, threads: np.ndarray) -> Clock:
        """What threads (R,) make known by arriving at a barrier."""
        seen = self.seen[threads]
        seen[np.arange(len(threads)), threads] = self.now[threads >> 5]
        clock = Clock(seen.max(axis=0), self.proxied[threads].max(axis=0))
        self.now[np.unique(threads >> 5)] += 1
        return clock

    def acquire(self, threads: np.ndarray, clock: Clock) -> None:
        """Threads (R,) learn what a clock carries."""
        count = len(clock.seen)
        if count:
            self.seen[threads, :count] = np.maximum(self.seen[threads, :count], clock.seen)
            self.proxied[threads, :count] = np.maximum(self.proxied[threads, :count], clock.proxied)

    def learn(self, threads: np.ndarray, agents: np.ndarray | int, time: np.ndarray | int) -> None:
        """Threads (R,) learn that agents, one each or one for all, are done up to a time."""
        self.seen[threads, agents] = np.maximum(self.seen[threads, agents], time)

    def fence_proxy(self, threads: np.ndarray) -> None:
        """fence.proxy.async: the async proxy sees whatever the threads (R,) have seen or written."""
        seen = self.seen[threads]
        seen[np.arange(len(threads)), threads] = self.now[threads >> 5]
        self.proxied[threads] = np.maximum(self.proxied[threads], seen)
        self.now[np.unique(threads >> 5)] += 1

    def warps_known(self, threads: np.ndarray) -> np.ndarray:
        """(R, warps): the time up to which threads (R,) know of all lanes of each warp."""
        return self.seen[threads, : self.threads].reshape(len(threads), -1, 32).min(axis=2)
