"""How long training takes, and how fast it goes: by minutes or by steps."""

from __future__ import annotations

import math
import time

from thanos.engine.peers import ALONE, Peers

_WARM_UP = 5  # steps


class Budget:
    """How much of the training is done, by the clock of the first process.

    Args:
        minutes, steps: exactly one of them.
        passed: seconds that an earlier part of the same run took.
        peers: the processes that train together; all ask for the same steps in the same order.
    """

    def __init__(self, minutes: float | None, steps: int | None, passed: float = 0.0, peers: Peers = ALONE) -> None:
        self._limit = None if minutes is None else 60 * minutes
        self._steps, self._passed, self._peers = steps, passed, peers
        self._begin: float | None = None
        self._last = (-1, passed)

    def start(self) -> None:
        """From here on time counts."""
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """That training took so far, by this process' clock."""
        return self._passed + (0.0 if self._begin is None else time.perf_counter() - self._begin)

    def seconds_at(self, step: int) -> float:
        """That it took when so many steps were done, the same for all: the clock is read once a step."""
        if step != self._last[0]:
            self._last = step, self._peers.object(self.seconds)
        return self._last[1]

    def progress(self, step: int) -> float:
        """From 0 to 1, after so many steps."""
        done = self.seconds_at(step) / self._limit if self._limit is not None else step / (self._steps or 1)
        return min(1.0, done)

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied by in a step: a short rise, then half a cosine down to nothing."""
        return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * self.progress(step))) / 2
