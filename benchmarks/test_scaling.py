"""How the time of `prune_weight` at 50% grows with the width of a square layer, and how it depends on the block size.

The paper's algorithm (benchmarks/paper.py) stands beside the engine up to 2048 columns; its inverses alone grow as the
fourth power. ``THANOS_BENCH_SIZE`` replaces 4096: twice that is the greatest width, half of it the paper's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor

from benchmarks import ge, paper
from benchmarks.ge import FIT_FROM, SIZE
from benchmarks.records import Row
from thanos import prune_weight

WIDTHS = [512, 1024, 2048, 4096, 8192]
LIMIT = 3.1
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024]
DEFAULT_BLOCK = 128


@lru_cache(maxsize=1)
def square(width: int) -> tuple[Tensor, Tensor]:
    return ge.layer(width, width)


@pytest.fixture(scope="module")
def curves() -> dict[str, dict[int, float]]:
    """Seconds by method and width."""
    return defaultdict(dict)


@pytest.fixture(scope="module", autouse=True)
def exponents(curves: dict[str, dict[int, float]], finding: Callable[[str], None]) -> Iterator[None]:
    yield
    for method, curve in curves.items():
        fitted = {width: seconds for width, seconds in curve.items() if width >= FIT_FROM}
        if len(fitted) > 1:
            slope = ge.fitted_exponent(list(fitted), list(fitted.values()))
            limit = f" (at most {LIMIT} to reach)" if method == "thanos" else ""
            finding(f"{method}, 50%: seconds grow as width^{slope:.2f} from {min(fitted)} to {max(fitted)}{limit}")


@pytest.mark.parametrize("method", ["sparsegpt", "thanos", "paper"])
@pytest.mark.parametrize("width", WIDTHS)
def test_width(benchmark: Any, record: Callable[..., None], curves: Any, width: int, method: str) -> None:
    widest = SIZE // 2 if method == "paper" else 2 * SIZE
    if width > widest:
        pytest.skip(f"{method} runs up to {widest} columns: raise THANOS_BENCH_SIZE above {SIZE}")
    found = measured(benchmark, width, method, "0.5", DEFAULT_BLOCK, rounds=1 if method == "paper" else None)
    curves[method][width] = found["seconds"]
    record(f"{method} 0.5, {width} x {width}", kind="width", **found)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_size(benchmark: Any, record: Callable[..., None], block_size: int, pattern: str) -> None:
    if block_size > SIZE:
        pytest.skip(f"a block has at most {SIZE} columns: raise THANOS_BENCH_SIZE")
    found = measured(benchmark, SIZE, "thanos", pattern, block_size, rounds=2)
    record(f"thanos {pattern}, {SIZE} x {SIZE}, B = {block_size}", kind="block_size", **found)


def measured(benchmark: Any, width: int, method: str, pattern: str, block_size: int, rounds: int | None) -> Row:
    """The fields of a record of a square layer."""
    weight, hessian = square(width)

    def prune() -> object:
        if method == "paper":
            return paper.prune(weight, hessian, float(pattern), block_size=block_size)
        return prune_weight(weight, hessian, pattern, method=method, block_size=block_size)

    options = {"rows": width, "columns": width, "method": method, "pattern": pattern, "block_size": block_size}
    return options | ge.time_layer(benchmark, prune, weight, hessian, rounds=rounds)
