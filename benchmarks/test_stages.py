"""The refit and the mask search after Thanos on one square layer: seconds, GE and the share of the loss they leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import ge
from benchmarks.ge import SIZE
from thanos import parse_pattern, prune_weight
from thanos.engine.mask_search import search_mask
from thanos.engine.refine import Refined, refit

LIMITS = {"refit": 4.0, "search": 40.0}  # GE to reach at 4096 x 4096


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("stage", list(LIMITS))
def test_stage(benchmark: Any, record: Callable[..., None], stage: str, pattern: str) -> None:
    weight, hessian = ge.layer(SIZE, SIZE)
    pruned = prune_weight(weight, hessian, pattern, block_size=128)
    given = (weight, pruned.weight, pruned.mask, hessian, pruned.damping)
    results: list[Refined] = []

    def run() -> None:
        results[:] = [refit(*given) if stage == "refit" else search_mask(*given, parse_pattern(pattern))]

    timed = ge.time_layer(benchmark, run, weight, hessian)
    record(
        f"{stage} after Thanos, {pattern}, {SIZE}", kind="stage", stage=stage, pattern=pattern, rows=SIZE, columns=SIZE,
        limit_ge=LIMITS[stage] if SIZE == 4096 else None,
        loss_left=float(results[0].loss_after.sum() / results[0].loss_before.sum()), **timed,
    )  # fmt: skip
