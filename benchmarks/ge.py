"""The unit of the layer benchmarks: one GE is the time of a dense c x b x b float32 product in the same run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from thanos.layer import PrunedWeight

SIZE = int(os.environ.get("THANOS_BENCH_SIZE", "4096"))
"""The width that most of the layer, scaling and operation benchmarks run at; a small one makes a quick run."""

_FEW_TOKENS_BEYOND = 4096  # columns; the Hessian of 2 b tokens would take longer than what it serves
_SECONDS_OF_ROUNDS = 2.0
_MOST_ROUNDS = 3
_LARGE_PRODUCT = 4096**3  # multiplications; a larger one is timed only once
_products: dict[tuple[int, int], float] = {}  # seconds by shape, the fastest of this run


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def best_of(function: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of ``runs`` calls, after one to warm up."""
    function()
    return min(seconds_of(function) for _ in range(runs))


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random float32 weight (c, b) and the Hessian (b, b) of correlated inputs.

    There are 2 b inputs; beyond 4096 columns b / 4, and a ridge that makes up for the missing ones.
    """
    generator = torch.Generator().manual_seed(0)
    few = columns > _FEW_TOKENS_BEYOND
    inputs = torch.randn(columns // 4 if few else 2 * columns, columns, generator=generator)
    inputs += inputs.roll(1, 1) * 0.5 + inputs[:, :1]
    weight = torch.randn(rows, columns, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    if few:
        hessian.diagonal().add_(1)
    return weight, hessian


def gemm_seconds(weight: Tensor, hessian: Tensor, runs: int = 3) -> float:
    """Seconds of one GE: the fastest of ``runs``."""
    return best_of(lambda: weight @ hessian, runs)


def fitted_exponent(widths: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of ``seconds ~ width^p`` by least squares over the logarithms of at least two widths."""
    return linear_regression([log(width) for width in widths], [log(one) for one in seconds]).slope


@dataclass(frozen=True)
class Timed:
    """One benchmark of a layer: seconds of the fastest round and of one GE, steps of that round, and peak memory."""

    seconds: float
    ge_seconds: float
    steps: dict[str, float]
    peak_floats: float

    @property
    def ge(self) -> float:
        return self.seconds / self.ge_seconds

    @property
    def fields(self) -> dict[str, Any]:
        """As they stand in a benchmark's ``extra_info``."""
        return {
            "seconds": self.seconds,
            "ge": self.ge,
            "ge_seconds": self.ge_seconds,
            "steps": self.steps,
            "peak_floats": self.peak_floats,
        }

    def share_of_steps(self) -> str:
        """The steps in GE, for the summary."""
        return ", ".join(f"{step} {seconds / self.ge_seconds:.2f}" for step, seconds in self.steps.items())


def unit_seconds(weight: Tensor, hessian: Tensor) -> float:
    """Seconds of one GE: the fastest product of this shape so far in this run, timed once more by each call."""
    shape = (len(weight), len(hessian))
    if shape not in _products:
        _products[shape] = seconds_of(lambda: weight @ hessian)
    if len(weight) * len(hessian) ** 2 <= _LARGE_PRODUCT:
        _products[shape] = min(_products[shape], seconds_of(lambda: weight @ hessian))
    return _products[shape]


def time_layer(
    benchmark: Any, prune: Callable[[], object], weight: Tensor, hessian: Tensor, *, rounds: int | None = None
) -> Timed:
    """Time ``prune``: by default one call that warms up, and then two seconds of rounds, three at most.

    A layer that promises to take more than those two seconds runs once.

    Args:
        prune: returns a :class:`PrunedWeight`, or anything else where there are no steps to report.
        rounds: exactly so many, none to warm up.
    """
    steps: list[dict[str, float]] = []
    peaks: list[int] = []
    unit = unit_seconds(weight, hessian)

    def run() -> None:
        result = prune()
        steps.append(result.seconds if isinstance(result, PrunedWeight) else {})

    if rounds is None and unit * (1 + len(hessian) / len(weight)) < _SECONDS_OF_ROUNDS:
        first = seconds_of(lambda: peaks.append(peak_bytes(run)))
        steps.clear()
        rounds = min(_MOST_ROUNDS, max(1, round(_SECONDS_OF_ROUNDS / first)))
        benchmark.pedantic(run, rounds=rounds)
    else:
        benchmark.pedantic(lambda: peaks.append(peak_bytes(run, interval=0.01)), rounds=rounds or 1)
    times = benchmark.stats.stats.data
    fastest = min(range(len(times)), key=times.__getitem__)
    return Timed(times[fastest], unit, steps[fastest], max(peaks) / 4)
