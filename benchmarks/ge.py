"""The unit of the layer benchmarks: one GE is the time of a dense c x b x b float32 product in the same run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import seconds_of
from benchmarks.memory import peak_bytes
from benchmarks.records import Row
from thanos import PrunedWeight

SIZE = int(os.environ.get("THANOS_BENCH_SIZE", "4096"))
"""The width that most of the layer, scaling and operation benchmarks run at; a small one makes a quick run."""

FIT_FROM = 1024  # columns; narrower layers fit into the cache, and say nothing of the growth
_FEW_TOKENS_BEYOND = 4096  # columns; the Hessian of 2 b tokens would take longer than what it serves
_SECONDS_OF_ROUNDS = 2.0
_MOST_ROUNDS = 3
_LARGE_PRODUCT = 4096**3  # multiplications; a larger one is timed only once
_products: dict[tuple[int, int], float] = {}  # seconds by shape, the last time


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


def fitted_exponent(widths: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of ``seconds ~ width^p`` by least squares over the logarithms of at least two widths."""
    return linear_regression([log(width) for width in widths], [log(one) for one in seconds]).slope


def unit_seconds(weight: Tensor, hessian: Tensor) -> float:
    """Seconds of one GE now; of a product too large to repeat, when this run first timed it."""
    shape = (len(weight), len(hessian))
    if shape not in _products:
        weight @ hessian
    if shape not in _products or len(weight) * len(hessian) ** 2 <= _LARGE_PRODUCT:
        _products[shape] = seconds_of(lambda: weight @ hessian)
    return _products[shape]


def middle_round(seconds: Sequence[float], units: Sequence[float]) -> tuple[int, float]:
    """The round of the median GE, the lower of two, and the seconds of one GE around it.

    Args:
        seconds: of each round.
        units: of one GE before the first round and after each.
    """
    around = [(before + after) / 2 for before, after in pairwise(units)]
    if len(around) != len(seconds):
        raise ValueError(f"{len(seconds)} rounds need one product more than that, not {len(units)}")
    order = sorted(range(len(seconds)), key=lambda i: seconds[i] / around[i])
    chosen = order[(len(order) - 1) // 2]
    return chosen, around[chosen]


def time_layer(
    benchmark: Any,
    prune: Callable[[], object],
    weight: Tensor,
    hessian: Tensor,
    *,
    rounds: int | None = None,
    rival: Callable[[], object] | None = None,
) -> Row:
    """Time ``prune``, a GE before and after each round, so that a machine that slows down slows both.

    By default one call warms up, and then come two seconds of rounds, three at most. A layer that promises to take more
    than those two seconds runs once.

    Args:
        prune: returns a :class:`PrunedWeight`, or anything else where there are no steps to report.
        rounds: exactly so many; two or fewer are not warmed up.
        rival: what is timed before each round, to compare with it.

    Returns:
        ``seconds``, ``ge`` and ``steps`` (seconds by step) of the round of the median GE; ``ge_seconds``, the mean of
        the products just before and just after it; ``peak_floats``, the peak memory of all rounds in floats of 4 bytes;
        ``times_of_rival``, the median over the rounds of their seconds over the rival's, or None.
    """
    steps: list[dict[str, float]] = []
    peaks: list[int] = []
    units: list[float] = []
    rivals: list[float] = []

    def run() -> None:
        result = prune()
        steps.append(result.seconds if isinstance(result, PrunedWeight) else {})

    def before() -> None:
        if rival is not None:
            rivals.append(seconds_of(rival))
        units.append(unit_seconds(weight, hessian))

    promised = unit_seconds(weight, hessian) * (1 + len(hessian) / len(weight))
    if (rounds is None and promised < _SECONDS_OF_ROUNDS) or (rounds or 1) > 2:
        first = seconds_of(lambda: peaks.append(peak_bytes(run)))
        steps.clear()
        rounds = rounds or min(_MOST_ROUNDS, max(1, round(_SECONDS_OF_ROUNDS / first)))
        benchmark.pedantic(run, setup=before, rounds=rounds)
    else:
        benchmark.pedantic(lambda: peaks.append(peak_bytes(run, interval=0.01)), setup=before, rounds=rounds or 1)
    units.append(unit_seconds(weight, hessian))
    times = benchmark.stats.stats.data
    chosen, around = middle_round(times, units)
    return {
        "seconds": times[chosen],
        "ge": times[chosen] / around,
        "ge_seconds": around,
        "steps": steps[chosen],
        "peak_floats": max(peaks) / 4,
        "times_of_rival": median(own / other for own, other in zip(times, rivals, strict=True)) if rivals else None,
    }
