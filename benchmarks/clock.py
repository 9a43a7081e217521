"""How long work takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def best_of(function: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of ``runs`` calls, after one to warm up."""
    function()
    return min(seconds_of(function) for _ in range(runs))


def in_turns(functions: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """Median seconds of each function over ``runs`` rounds, after one to warm up; in a round each runs once."""
    rounds = [[seconds_of(function) for function in functions] for _ in range(runs + 1)]
    return [median(times) for times in zip(*rounds[1:], strict=True)]


def waited(function: Callable[[], object], device: str) -> Callable[[], None]:
    """The function, finished on its device when it returns."""

    def run() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return run
