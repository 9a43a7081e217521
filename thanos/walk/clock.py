"""Where the time of a walk goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Splits the time of a walk among named parts; a part inside another interrupts it."""

    def __init__(self) -> None:
        self.seconds = {"forward": 0.0, "hessian": 0.0, "prune": 0.0, "other": 0.0}
        self._part = "other"
        self._since = self.begin = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, part: str) -> str:
        now, before = time.perf_counter(), self._part
        self.seconds[before] += now - self._since
        self._since, self._part = now, part
        return before

    def stop(self) -> dict[str, float]:
        """Seconds of each part, and their ``total``."""
        self._switch("other")
        return {**self.seconds, "total": sum(self.seconds.values())}
