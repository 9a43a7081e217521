"""The engine against the naive form of the algorithm, on every backend, several blocks, ragged shapes."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thanos_kernels as kernels
from thanos import parse_pattern, prune_weight
from thanos.engine import naive
from thanos.options import METHODS, METRICS

PATTERNS = ["0.5", "0.83", "2:4", "4:8", "structured:0.3"]
FLOAT32 = ["native", "triton", "reference"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 12),
    groups=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    method=st.sampled_from(METHODS),
    pattern=st.sampled_from(PATTERNS),
    block=st.sampled_from([8, 16, 24, 64]),
    alpha=st.sampled_from([0.0, 0.2]),
    metric=st.sampled_from(METRICS),
)
def test_float64_is_the_naive_form(
    rows: int, groups: int, seed: int, method: str, pattern: str, block: int, alpha: float, metric: str
) -> None:
    weight, hessian = oracle.layer(rows, 8 * groups, seed)
    options: dict[str, Any] = {"metric": metric} if method == "thanos" else {}
    result = prune_weight(weight, hessian, pattern, method=method, block_size=block, outlier_fraction=alpha, **options)
    expected, mask = naive.prune(weight, hessian, parse_pattern(pattern), method, block, alpha, **options)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["0.5", "2:4", "structured:0.3"])
@pytest.mark.parametrize("backend", FLOAT32)
def test_float32_is_within_rounding_of_it(method: str, pattern: str, backend: str) -> None:
    """B = 128, three blocks, the last one ragged. A row whose mask is the same has the same weights to 1e-3; at most
    one weight in 200 is chosen otherwise (a near-tie decides what follows), and the loss is the same to 0.5%."""
    if backend not in kernels.backends():
        pytest.skip(f"no {backend} backend here")
    weight, hessian = oracle.layer(37, 308, seed=3)
    result = prune_weight(
        weight.float(), hessian.float(), pattern, method=method, block_size=128, outlier_fraction=0.1, backend=backend
    )
    expected, mask = naive.prune(weight, hessian, parse_pattern(pattern), method, 128, 0.1)
    assert int(result.mask.sum()) == int(mask.sum()) == result.removed
    assert int((result.mask != mask).sum()) <= weight.numel() / 200
    same = (result.mask == mask).all(1)
    assert int(same.sum()) >= 18
    torch.testing.assert_close(result.weight[same].double(), expected[same], rtol=1e-3, atol=1e-3)
    loss = oracle.layer_loss(weight, expected, hessian)
    assert oracle.layer_loss(weight, result.weight, hessian) == pytest.approx(loss, rel=5e-3)
    assert result.loss == pytest.approx(loss, rel=5e-3)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 20), width=st.integers(1, 60), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_for_one_block_and_mask_no_errors_are_shorter_than_thanos(
    rows: int, width: int, share: float, seed: int
) -> None:
    weight, hessian = oracle.layer(rows, width, seed)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < share
    upper, _, _ = kernels.inverse_factor(hessian)
    thanos = kernels.row_solve(upper.T @ upper, weight, mask) @ upper.T
    sparsegpt = kernels.column_sweep(upper, weight, mask)
    for errors in (thanos, sparsegpt):  # both make the removed weights zero
        torch.testing.assert_close((errors @ upper)[mask], weight[mask], rtol=1e-6, atol=1e-6)
    assert (thanos.norm(dim=1) <= sparsegpt.norm(dim=1) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("factor", [2.0**-12, 2.0**9])
def test_scaling_the_weight_scales_the_result(method: str, pattern: str, factor: float) -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(16, 64, seed=4))
    options: dict[str, Any] = {"method": method, "block_size": 24, "outlier_fraction": 0.1}
    plain = prune_weight(weight, hessian, pattern, **options)
    scaled = prune_weight(weight * factor, hessian, pattern, **options)
    assert torch.equal(scaled.mask, plain.mask)
    assert torch.equal(scaled.weight, plain.weight * factor)
    assert scaled.loss == pytest.approx(plain.loss * factor**2, rel=1e-6)
