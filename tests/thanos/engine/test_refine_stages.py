"""Refinements behind any method and pattern: the pattern is kept exactly, and no stage raises the layer loss."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos import prune_weight
from thanos.options import METHODS, REFINEMENTS


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 16),
    groups=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    method=st.sampled_from(METHODS),
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "4:8", "structured:0.3"]),
    alpha=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_stages_compose(
    rows: int, groups: int, seed: int, method: str, pattern: str, alpha: float, dtype: torch.dtype
) -> None:
    weight, hessian = (tensor.to(dtype) for tensor in oracle.layer(rows, 8 * groups, seed))
    options = {"method": method, "block_size": 16, "outlier_fraction": alpha}
    results = [prune_weight(weight, hessian, pattern, refine=refine, **options) for refine in REFINEMENTS]
    losses = [oracle.layer_loss(weight, result.weight, hessian) for result in results]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert losses[1] <= losses[0] * (1 + tolerance)
    assert losses[2] <= losses[1] * (1 + tolerance)
    for result, loss in zip(results, losses, strict=True):
        assert result.loss == pytest.approx(loss, rel=1e-6 if dtype == torch.float64 else 1e-2)
        assert (result.weight[result.mask] == 0).all()
        assert result.removed == results[0].removed
        outliers = ~results[0].mask.any(1)
        assert torch.equal(result.weight[outliers], weight[outliers])
    if pattern in ("2:4", "4:8"):
        n, m = map(int, pattern.split(":"))
        counts = results[2].mask[~outliers].unflatten(1, (-1, m)).sum(2)
        assert (counts == n).all()
    again = prune_weight(weight, hessian, pattern, refine="admm", **options)
    assert torch.equal(again.weight, results[2].weight)


@pytest.mark.parametrize("refine", ["refit", "admm"])
def test_a_refined_layer_keeps_its_dtype_and_dead_columns(refine: str) -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(16, 32, seed=6))
    hessian[5] = 0
    hessian[:, 5] = 0
    result = prune_weight(weight.bfloat16(), hessian, "0.5", refine=refine)
    assert result.weight.dtype == torch.bfloat16
    assert (result.weight[:, 5] == 0).all()
    assert result.mask[:, 5].all()
    assert "refine" in result.seconds
