"""Where the time goes, step by step, without making a device wait; and the one place where a device is waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def immediate(tensor: Tensor) -> bool:
    """Whether reading a value of ``tensor`` costs nothing, as on the CPU; a device must be waited for."""
    return tensor.device.type == "cpu"


def read(*values: Tensor) -> list[float]:
    """The values of 0-d tensors of one device, by one wait."""
    return [float(value) for value in torch.stack([value.double() for value in values]).cpu().tolist()]


class StepTimer:
    """Adds up the time of named steps: wall time on the CPU, events in the stream on a CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Time the body as part of ``step``."""
        if self._device.type == "cuda":
            begin = event(self._device)
            yield
            self._events.append((step, begin, event(self._device)))
        else:
            start = time.perf_counter()
            yield
            self._seconds[step] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds per step. On a device, call it only after the work has been waited for."""
        for step, begin, end in self._events:
            self._seconds[step] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


def event(device: torch.device) -> torch.cuda.Event:
    """An event at this point of the stream of ``device``, which need not be the current device."""
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark
