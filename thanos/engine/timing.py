"""Where the time goes, step by step, without making a device wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepTimer:
    """Adds up the time of named steps: wall time on the CPU, events in the stream on a CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self._on_stream = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time the body as part of ``step``."""
        if self._on_stream:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((step, begin, end))
        else:
            begin_seconds = time.perf_counter()
            yield
            self._seconds[step] += time.perf_counter() - begin_seconds

    def seconds(self) -> dict[str, float]:
        """Seconds per step. On a device, call it only after the work has been waited for."""
        for step, begin, end in self._events:
            self._seconds[step] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
