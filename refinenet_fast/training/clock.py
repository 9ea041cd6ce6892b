"""Seconds of training, and how many of them are spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MUCH = 0.05  # of the time spent waiting: more workers would help


class Clock:
    """Counts from one lap to the next. What the first batch takes, while workers start, is in its lap and in no total.

    Attributes:
        seconds, waited: Totals.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self._began, self._waited = time.perf_counter(), 0.0

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them waited."""
        now = time.perf_counter()
        seconds, waited = now - self._began, self._waited
        self.seconds += seconds
        self.waited += waited
        self._began, self._waited = now, 0.0
        return seconds, waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is not counted."""
        begin = time.perf_counter()
        yield
        self._began += time.perf_counter() - begin

    def waiting(self, items: Iterable[Any]) -> Iterator[Any]:
        """``items``; the time until each comes is waited."""
        begin = time.perf_counter()
        for number, item in enumerate(items):
            spent = time.perf_counter() - begin
            self._waited += spent
            if number == 0:
                self.seconds -= spent
                self.waited -= spent
            yield item
            begin = time.perf_counter()

    @property
    def share(self) -> float:
        """Waited, of all seconds."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    def summary(self) -> str:
        advice = "; more --workers may help" if self.share > MUCH else ""
        return f"trained for {self.seconds:.1f} s, {100 * self.share:.1f} % of them waiting for data{advice}"
