"""`prune_weight` on a 4096 x 4096 layer: seconds, GE, seconds per step and peak memory.

``THANOS_BENCH_SIZE`` takes another size; ``--benchmark-json`` keeps the numbers.
"""

from __future__ import annotations

import os
import threading
import time

import psutil
import pytest

from benchmarks.ge import gemm_seconds, layer
from thanos import prune_weight

SIZE = int(os.environ.get("THANOS_BENCH_SIZE", "4096"))

CASES = [  # method, pattern, outlier fraction, GE to reach
    ("thanos", "0.5", 0.0, 2.0),
    ("thanos", "2:4", 0.0, 3.5),
    ("thanos", "structured:0.3", 0.1, 1.2),
    ("sparsegpt", "0.5", 0.0, 3.0),
    ("sparsegpt", "2:4", 0.0, 3.0),
    ("wanda", "0.5", 0.0, None),
    ("wanda", "2:4", 0.0, None),
    ("magnitude", "0.5", 0.0, None),
]


@pytest.fixture(scope="module")
def case_layer():
    return layer(SIZE, SIZE)


@pytest.mark.parametrize(("method", "pattern", "alpha", "limit"), CASES)
def test_prune_weight(benchmark, ge_row, case_layer, method, pattern, alpha, limit) -> None:
    weight, hessian = case_layer

    def prune():
        return prune_weight(weight, hessian, pattern, method=method, outlier_fraction=alpha)

    unit = gemm_seconds(weight, hessian)
    result = benchmark.pedantic(prune, rounds=3, warmup_rounds=1)
    unit = min(unit, gemm_seconds(weight, hessian))
    ge = benchmark.stats.stats.min / unit
    benchmark.extra_info |= {
        "ge": ge,
        "ge_seconds": unit,
        "seconds": result.seconds,
        "loss": result.loss,
        "peak_floats": peak_bytes(prune) / 4,
    }
    ge_row(f"{method} {pattern}" + (f", alpha {alpha:g}" if alpha else ""), ge, limit)
    ge_row("    of it " + ", ".join(f"{step} {value / unit:.2f}" for step, value in result.seconds.items()), ge, None)


def peak_bytes(function) -> int:
    """How far the process grows while ``function`` runs, sampled each millisecond."""
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0, peak - before)
