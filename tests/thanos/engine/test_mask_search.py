"""A mask search keeps pattern and counts exactly, finds better masks, and never raises the loss."""

from __future__ import annotations

from itertools import combinations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos import parse_pattern, prune_weight
from thanos.engine.mask_search import Schedule, search_mask
from thanos.engine.methods import METHODS
from thanos.engine.refine import refit

quick = settings(max_examples=12, deadline=None)


@quick
@given(
    method=st.sampled_from(sorted(METHODS)),
    pattern=st.sampled_from(["0.5", "0.8", "2:4", "1:3", "structured:0.3"]),
    alpha=st.sampled_from([0.0, 0.2]),
    dead=st.sets(st.integers(0, 47), max_size=5),
    seed=st.integers(0, 10**6),
    schedule=st.builds(Schedule, rho=st.floats(0.01, 3), stages=st.integers(0, 4), rounds=st.integers(1, 4)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_pattern_and_counts_are_kept_and_the_loss_never_rises(
    method: str, pattern: str, alpha: float, dead: set[int], seed: int, schedule: Schedule, dtype: torch.dtype
) -> None:
    weight, hessian = (tensor.to(dtype) for tensor in oracle.layer(15, 48, seed))
    hessian[list(dead)], hessian[:, list(dead)] = 0, 0
    pruned = prune_weight(weight, hessian, pattern, method=method, outlier_fraction=alpha, block_size=12)
    by_row = method == "wanda" and pattern in ("0.5", "0.8")
    given = (weight, pruned.weight, pruned.mask, hessian, 0.01, parse_pattern(pattern))
    result = search_mask(*given, by_row=by_row, schedule=schedule, sweeps=3)
    again = search_mask(*given, by_row=by_row, schedule=schedule, sweeps=3)
    assert torch.equal(result.weight, again.weight)
    assert torch.equal(result.mask, again.mask)
    assert (result.weight[result.mask] == 0).all()
    if ":" in pattern or by_row:
        assert torch.equal(result.mask.sum(1), pruned.mask.sum(1))
    assert int(result.mask.sum()) == int(pruned.mask.sum())
    if ":" in pattern and not pattern.startswith("structured"):
        n, m = map(int, pattern.split(":"))
        assert (result.mask.unflatten(1, (-1, m)).sum(2) == pruned.mask.unflatten(1, (-1, m)).sum(2)).all()
        touched = pruned.mask.any(1)
        assert (result.mask[touched].unflatten(1, (-1, m)).sum(2) >= n).all()
    untouched = ~pruned.mask.any(1)
    assert torch.equal(result.weight[untouched], pruned.weight[untouched])
    loss = oracle.layer_loss(weight, result.weight, hessian)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert loss <= oracle.layer_loss(weight, pruned.weight, hessian) * (1 + tolerance)
    assert float(result.loss_after.sum()) == pytest.approx(loss, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("stages", [3, 6])
def test_the_search_is_admm_as_the_textbook_has_it(pattern: str, stages: int) -> None:
    weight, hessian = oracle.layer(12, 32, seed=3)
    pruned = prune_weight(weight, hessian, pattern)
    schedule = Schedule(rho=0.1, stages=stages, rounds=3)
    result = search_mask(
        weight, pruned.weight, pruned.mask, hessian, 0.01, parse_pattern(pattern), schedule=schedule, sweeps=3
    )
    mask = oracle.admm(
        weight,
        pruned.weight,
        pruned.mask,
        hessian,
        n_of_m=(2, 4) if ":" in pattern else None,
        rho=schedule.rho,
        stages=stages,
        rounds=3,
        growth=schedule.growth,
    )
    assert not torch.equal(mask, pruned.mask)
    same = (result.mask == mask).all(1)  # a row of n:m that did not gain keeps its start
    assert (same | (result.mask == pruned.mask).all(1)).all()
    assert same.float().mean() > 0.7


def test_the_search_comes_near_the_best_of_all_masks() -> None:
    found, exact, started = 0.0, 0.0, 0.0
    for seed in range(4):
        weight, hessian = oracle.layer(1, 10, seed)
        full = oracle.damped(hessian, 0.01)
        losses = []
        for columns in combinations(range(10), 5):
            mask = torch.zeros(1, 10, dtype=torch.bool)
            mask[0, list(columns)] = True
            losses.append(oracle.layer_loss(weight, oracle.least_squares(weight, full, mask, 0.0), full))
        pruned = prune_weight(weight, full, "0.5", method="magnitude")
        started += float(refit(weight, pruned.weight, pruned.mask, full, 0.0, sweeps=50).loss_after.sum())
        result = search_mask(
            weight, pruned.weight, pruned.mask, full, 0.0, parse_pattern("0.5"), schedule=Schedule(stages=20), sweeps=50
        )
        found, exact = found + float(result.loss_after.sum()), exact + min(losses)
    assert exact <= found < exact + 0.5 * (started - exact)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_a_search_beats_a_refit(pattern: str) -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(32, 96, seed=1))
    pruned = prune_weight(weight, hessian, pattern)
    given = (weight, pruned.weight, pruned.mask, hessian, 0.01)
    search = search_mask(*given, parse_pattern(pattern))
    assert float(search.loss_after.sum()) < 0.97 * float(refit(*given).loss_after.sum())


def test_unequal_rows_are_no_pattern_by_row() -> None:
    weight, hessian = oracle.layer(8, 16, seed=2)
    pruned = prune_weight(weight, hessian, "0.5")
    with pytest.raises(ValueError, match="the same count in every row"):
        search_mask(weight, pruned.weight, pruned.mask, hessian, 0.01, parse_pattern("0.5"), by_row=True)


@pytest.mark.parametrize("numbers", [{"rho": 0.0}, {"stages": -1}, {"rounds": 0}, {"growth": (0.5, 1.0, 1.0)}])
def test_schedules_that_cannot_be_are_refused(numbers: dict) -> None:
    with pytest.raises(ValueError, match="a mask search needs"):
        Schedule(**numbers)
