"""Where the time of a walk goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from thanos.engine.timing import event

PARTS = ("forward", "hessian", "prune", "other")


class Clock:
    """Splits the time of a walk among named parts; a part inside another interrupts it.

    On a CUDA or ROCm device the time is that of the stream, by events: of the work, not of its launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._part = "other"
        self._begin = time.perf_counter()
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [(self._part, self._now())]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def elapsed(self) -> float:
        """Seconds since the walk began, by the wall clock."""
        return time.perf_counter() - self._begin

    def stop(self) -> dict[str, float]:
        """Seconds of each part so far, and their ``total``; the clock may go on."""
        self._switch("other")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] = seconds.get(part, 0.0) + _between(begin, end)
        return {**seconds, "total": sum(seconds.values())}

    def _switch(self, part: str) -> str:
        before, self._part = self._part, part
        self._marks.append((part, self._now()))
        return before

    def _now(self) -> float | torch.cuda.Event:
        return event(self._device) if self._device.type == "cuda" else time.perf_counter()


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
