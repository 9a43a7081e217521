"""Kept weights rounded to int8: on the grid that packing finds again, and never worse than plain rounding."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos import prune_weight
from thanos.engine.rounding import round_weights
from thanos.options import METHODS, REFINEMENTS
from thanos_kernels.sparse_int8 import rounded


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 16),
    columns=st.sampled_from([8, 64, 160]),
    seed=st.integers(0, 10**6),
    method=st.sampled_from(METHODS),
    refine=st.sampled_from(REFINEMENTS),
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "4:8"]),
    alpha=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_kept_weights_lie_on_the_grid_that_packing_finds(
    rows: int, columns: int, seed: int, method: str, refine: str, pattern: str, alpha: float, dtype: torch.dtype
) -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(rows, columns, seed))
    weight = weight.to(dtype)
    options = {"method": method, "refine": refine, "outlier_fraction": alpha}
    exact = prune_weight(weight, hessian, pattern, **options)
    result = prune_weight(weight, hessian, pattern, values="int8", **options)
    assert torch.equal(result.mask, exact.mask)
    assert (result.weight[result.mask] == 0).all()
    outliers = ~result.mask.any(1)
    assert torch.equal(result.weight[outliers], weight[outliers])
    kept = result.weight[~outliers]
    assert torch.equal(rounded(kept).to(dtype), kept), "the same scales and the same whole numbers"
    if dtype == torch.float32:
        loss = oracle.layer_loss(weight.double(), result.weight.double(), hessian.double())
        assert result.loss == pytest.approx(loss, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_later_columns_make_up_for_the_rounding(dtype: torch.dtype) -> None:
    weight, hessian = (tensor.to(dtype) for tensor in oracle.layer(64, 512, seed=3))
    pruned = prune_weight(weight, hessian, "0.5", refine="refit")
    problem = weight, pruned.weight, pruned.mask, hessian, pruned.damping
    plain, better = (round_weights(*problem, compensate=compensate) for compensate in (False, True))
    assert torch.equal(plain.loss_before, better.loss_before)
    assert (better.loss_after <= better.loss_before).all()
    rounding = plain.loss_after.sum() - pruned.loss
    assert better.loss_after.sum() - pruned.loss < 0.8 * rounding, "some of what rounding cost is back"
    for one in (plain, better):
        change = (one.weight - weight).double()
        assert torch.allclose(one.loss_after, ((change @ hessian.double()) * change).sum(1), rtol=1e-4)


def test_whole_columns_stay_plain() -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(16, 32, seed=1))
    plain, asked = (prune_weight(weight, hessian, "structured:0.25", values=values) for values in ("plain", "int8"))
    assert torch.equal(plain.weight, asked.weight)


def test_a_weight_too_large_for_a_scale_is_refused() -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(4, 8, seed=0))
    with pytest.raises(ValueError, match="too large for int8"):
        prune_weight(weight * 1e30, hessian, "0.5", values="int8")
