"""The unit of the layer benchmarks: one GE is the time of a dense c x b x b float32 product in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


def best_of(function: Callable[[], object], runs: int) -> float:
    """Seconds of the fastest of ``runs`` calls, after one to warm up."""
    function()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A random float32 weight (c, b) and the Hessian (b, b) of 2 b correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs += inputs.roll(1, 1) * 0.5 + inputs[:, :1]
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def gemm_seconds(weight: Tensor, hessian: Tensor, runs: int = 3) -> float:
    """Seconds of one GE: the fastest of ``runs``."""
    return best_of(lambda: weight @ hessian, runs)
