"""What must hold for a pruned layer, whatever the method: counts, zeros, losses, independence of rows."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos import Pattern, SemiStructured, Structured, Unstructured, factorise, prune_group, prune_weight
from thanos.engine.methods import METHODS

PATTERNS = [Unstructured(0.5), SemiStructured(2, 4), Structured(0.3)]
quick = settings(max_examples=25, deadline=None)
shapes = {"rows": st.integers(1, 24), "columns": st.integers(1, 40), "seed": st.integers(0, 10**6)}


@quick
@given(**shapes, sparsity=st.floats(0, 0.95), block=st.integers(1, 48))
def test_thanos_is_the_papers_algorithm(rows: int, columns: int, seed: int, sparsity: float, block: int) -> None:
    weight, hessian = oracle.layer(rows, columns, seed)
    pattern = Unstructured(sparsity)
    result = prune_weight(weight, hessian, pattern, block_size=block)
    expected, mask = oracle.thanos_blocks(weight, hessian, count=pattern.count(weight.numel()), block=block)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-8)


@quick
@given(rows=shapes["rows"], groups=st.integers(1, 8), seed=shapes["seed"], m=st.integers(2, 6), data=st.data())
def test_thanos_n_of_m_is_the_papers_algorithm(rows: int, groups: int, seed: int, m: int, data: st.DataObject) -> None:
    n, per_block = data.draw(st.integers(1, m - 1)), data.draw(st.integers(1, 10))
    weight, hessian = oracle.layer(rows, groups * m, seed)
    result = prune_weight(weight, hessian, SemiStructured(n, m), block_size=per_block * m)
    expected, mask = oracle.thanos_blocks(weight, hessian, n_of_m=(n, m), block=per_block * m)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-8)


@quick
@given(seed=shapes["seed"], metric=st.sampled_from(["obs", "magnitude"]), block=st.integers(1, 12))
def test_the_mask_metric_is_what_it_says(seed: int, metric: str, block: int) -> None:
    weight, hessian = oracle.layer(12, 40, seed)
    for pattern, chosen in [("0.5", {"count": 240}), ("2:4", {"n_of_m": (2, 4)})]:
        result = prune_weight(weight, hessian, pattern, block_size=4 * block, metric=metric)
        expected, mask = oracle.thanos_blocks(weight, hessian, **chosen, block=4 * block, metric=metric)
        assert torch.equal(result.mask, mask)
        torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-8)


def test_the_mask_metric_chooses_columns_too() -> None:
    weight, hessian = oracle.layer(12, 40, seed=5)
    inverse = torch.linalg.inv(oracle.damped(hessian, 0.01)).diagonal()
    for metric, scale in [("wanda", hessian.diagonal()), ("obs", 1 / inverse), ("magnitude", torch.ones(40))]:
        removed = prune_weight(weight, hessian, "structured:0.3", metric=metric).mask[0].nonzero()[:, 0]
        expected = oracle.smallest((weight.square().sum(0) * scale).tolist(), 12)
        assert set(removed.tolist()) == expected


@quick
@given(**shapes, block=st.integers(1, 48))
def test_sparsegpt_is_one_weight_at_a_time(rows: int, columns: int, seed: int, block: int) -> None:
    weight, hessian = oracle.layer(rows, columns, seed)
    result = prune_weight(weight, hessian, Unstructured(0.5), method="sparsegpt", block_size=block)
    expected, mask = oracle.sparsegpt_blocks(weight, hessian, sparsity=0.5, block=block)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-8, atol=1e-8)


@quick
@given(**shapes, sparsity=st.floats(0.05, 0.9), alpha=st.sampled_from([0.0, 0.1]))
def test_structured_thanos_is_the_least_squares_optimum(
    rows: int, columns: int, seed: int, sparsity: float, alpha: float
) -> None:
    rows += 1
    weight, hessian = oracle.layer(rows, columns, seed)
    result = prune_weight(weight, hessian, Structured(sparsity), outlier_fraction=alpha)
    outliers = math.ceil(alpha * rows)
    energy = torch.einsum("ij,jk,ik->i", weight, hessian, weight)
    untouched = energy.argsort(descending=True)[:outliers]
    assert torch.equal(result.weight[untouched], weight[untouched])
    pruned = ~result.mask.sum(1).eq(0)
    assert int(pruned.sum()) == rows - outliers
    assert torch.equal(result.mask[pruned], result.mask[pruned][:1].expand(rows - outliers, -1))
    assert int(result.mask[pruned][0].sum()) == Structured(sparsity).columns(columns, alpha)
    best = oracle.least_squares(weight, hessian, result.mask)
    torch.testing.assert_close(result.weight[pruned], best[pruned], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.15])
def test_zeros_counts_and_losses(method: str, pattern: Pattern, dtype: torch.dtype, alpha: float) -> None:
    weight, hessian = (tensor.to(dtype) for tensor in oracle.layer(33, 72, seed=1))
    result = prune_weight(weight, hessian, pattern, method=method, block_size=16, outlier_fraction=alpha)
    assert (result.weight[result.mask] == 0).all()
    assert (result.weight[~result.mask] != 0).all()
    rows = 33 - math.ceil(alpha * 33)
    expected = {
        Unstructured: rows * 36 if method == "wanda" else rows * 72 // 2,
        SemiStructured: rows * 36,
        Structured: rows * math.ceil(0.3 * 72 / (1 - alpha)),
    }[type(pattern)]
    if method == "sparsegpt" and isinstance(pattern, Unstructured):
        expected = sum(rows * min(16, 72 - start) // 2 for start in range(0, 72, 16))
    assert int(result.mask.sum()) == expected
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert result.loss == pytest.approx(oracle.layer_loss(weight, result.weight, hessian), rel=tolerance)


@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_loss_reported_is_the_sum_of_squared_errors(method: str, pattern: Pattern) -> None:
    """Section 2.3's identity: damped loss = sum(E^2). With no damping the two losses are one."""
    weight, hessian = oracle.layer(12, 48, seed=2)
    result = prune_weight(weight, hessian, pattern, method=method, block_size=8, damping=0.0)
    assert result.damping == 0.0
    assert result.loss == pytest.approx(oracle.layer_loss(weight, result.weight, hessian), rel=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_one_block_over_the_whole_layer_is_the_optimum_for_its_mask(damping: float) -> None:
    weight, hessian = oracle.layer(20, 60, seed=3)
    result = prune_weight(weight, hessian, SemiStructured(1, 2), block_size=60, damping=damping)
    best = oracle.least_squares(weight, hessian, result.mask, damping)
    torch.testing.assert_close(result.weight, best, rtol=1e-8, atol=1e-8)
    sparsegpt = prune_weight(weight, hessian, SemiStructured(1, 2), method="sparsegpt", block_size=60)
    best = oracle.least_squares(weight, hessian, sparsegpt.mask)
    assert sparsegpt.loss > oracle.layer_loss(weight, best, hessian), "which a column-by-column sweep is not"


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_n_of_m_are_independent_and_may_be_permuted(method: str) -> None:
    weight, hessian = oracle.layer(16, 32, seed=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    whole = prune_weight(weight, hessian, "2:4", method=method, block_size=8)
    permuted = prune_weight(weight[order], hessian, "2:4", method=method, block_size=8)
    assert torch.equal(permuted.mask, whole.mask[order])
    torch.testing.assert_close(permuted.weight, whole.weight[order])
    alone = prune_weight(weight[:1], hessian, "2:4", method=method, block_size=8)
    torch.testing.assert_close(alone.weight, whole.weight[:1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_permuting_rows_permutes_and_scaling_the_hessian_changes_nothing(method: str, pattern: Pattern) -> None:
    weight, hessian = oracle.layer(16, 32, seed=5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    options = {"method": method, "block_size": 8, "outlier_fraction": 0.1}
    whole = prune_weight(weight, hessian, pattern, **options)
    permuted = prune_weight(weight[order], hessian, pattern, **options)
    scaled = prune_weight(weight, hessian * 1024, pattern, **options)
    assert torch.equal(permuted.mask, whole.mask[order])
    torch.testing.assert_close(permuted.weight, whole.weight[order])
    assert torch.equal(scaled.mask, whole.mask)
    torch.testing.assert_close(scaled.weight, whole.weight)
    assert scaled.loss == pytest.approx(1024 * whole.loss)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dead_columns_are_zeroed_and_count_as_pruned(method: str, pattern: Pattern) -> None:
    weight, hessian = oracle.layer(16, 32, seed=6)
    dead = torch.tensor([3, 8, 31])
    hessian[dead] = 0
    hessian[:, dead] = 0
    result = prune_weight(weight, hessian, pattern, method=method, block_size=8)
    assert result.mask[:, dead].all()
    assert (result.weight[:, dead] == 0).all()
    assert result.weight.isfinite().all()
    if not isinstance(pattern, Structured):
        assert int(result.mask.sum()) == 16 * 16
    assert result.loss == pytest.approx(oracle.layer_loss(weight, result.weight, hessian), rel=1e-9)


def test_a_layer_nobody_uses_is_all_zero() -> None:
    result = prune_weight(torch.randn(4, 8), torch.zeros(8, 8), Unstructured(0.5))
    assert result.mask.all()
    assert (result.weight == 0).all()
    assert result.loss == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_come_back_in_their_own_type(method: str, dtype: torch.dtype) -> None:
    weight, hessian = oracle.layer(16, 64, seed=7)
    weight = weight.to(dtype)
    kept = weight.clone()
    result = prune_weight(weight, hessian.float(), "2:4", method=method)
    exact = prune_weight(weight.float(), hessian.float(), "2:4", method=method)
    assert torch.equal(weight, kept), "the weight given is not touched"
    assert result.weight.dtype == dtype
    assert torch.equal(result.mask, exact.mask)
    assert torch.equal(result.weight, exact.weight.to(dtype))


def test_a_strided_or_transposed_weight_is_no_different() -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(24, 40, seed=8))
    plain = prune_weight(weight, hessian, "0.5")
    transposed = prune_weight(weight.T.contiguous().T, hessian.T, "0.5")
    assert torch.equal(plain.mask, transposed.mask)
    torch.testing.assert_close(plain.weight, transposed.weight)


def test_a_group_is_its_layers_and_shares_one_factor() -> None:
    _, hessian = oracle.layer(1, 40, seed=9)
    weights = [torch.randn(rows, 40, dtype=torch.float64) for rows in (8, 24, 5)]
    group = prune_group(weights, hessian, "0.5", block_size=16)
    factor = factorise(hessian)
    for weight, result in zip(weights, group, strict=True):
        assert torch.equal(result.weight, prune_weight(weight, hessian, "0.5", block_size=16).weight)
        assert torch.equal(result.weight, prune_weight(weight, factor, "0.5", block_size=16).weight)
    assert group[0].seconds.keys() == {"factor", "select", "solve", "update", "loss"}
    assert group[1].seconds["factor"] < group[0].seconds["factor"]


def test_a_singular_hessian_gets_more_damping_and_says_so() -> None:
    weight, hessian = oracle.layer(8, 32, seed=10, tokens=4)
    result = prune_weight(weight.float(), hessian.float() - 0.02 * hessian.diagonal().mean() * torch.eye(32), "0.5")
    assert result.damping == pytest.approx(0.1)
    assert result.weight.isfinite().all()


def test_an_indefinite_hessian_is_refused() -> None:
    weight, hessian = oracle.layer(8, 32, seed=11)
    indefinite = hessian - 3 * hessian.diagonal().max() * torch.ones(32, 32) + torch.diag(hessian.diagonal())
    indefinite.fill_diagonal_(1.0)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite with any damping"):
        prune_weight(weight, indefinite, "0.5")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "hessian"])
def test_nan_and_infinity_are_refused(bad: float, where: str) -> None:
    tensors = dict(zip(("weight", "hessian"), oracle.layer(8, 16, seed=12), strict=True))
    tensors[where][1, 2] = bad
    for method in METHODS:
        with pytest.raises(ValueError, match="NaN or infinity"):
            prune_weight(**tensors, pattern="0.5", method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "obs"}, "method must be one of thanos, sparsegpt, wanda, magnitude"),
        ({"block_size": 0}, "block size must be at least 1"),
        ({"block_size": 6, "pattern": "2:4"}, "multiple of 4"),
        ({"pattern": "2:5"}, "a width that 5 divides, not 32"),
        ({"pattern": "structured:0.95", "outlier_fraction": 0.1}, "must not exceed 1"),
        ({"outlier_fraction": 1.0}, "outlier fraction must be at least 0 and less than 1"),
        ({"outlier_fraction": 0.99}, "each of the layer's 8 rows an outlier"),
        ({"outlier_fraction": math.nan}, "outlier fraction must be"),
        ({"damping": -1.0}, "damping must"),
        ({"damping": math.nan}, "damping must"),
        ({"backend": "fortran"}, "backend must be"),
        ({"metric": "hessian"}, "metric must be one of wanda, obs, magnitude"),
        ({"metric": "obs", "method": "wanda"}, "an option of the method thanos; wanda has its own"),
        ({"weight": torch.zeros(8)}, "non-empty floating matrix"),
        ({"weight": torch.zeros(0, 32)}, "non-empty floating matrix"),
        ({"weight": torch.zeros(8, 32, dtype=torch.int8)}, "non-empty floating matrix"),
        ({"weight": torch.zeros(8, 31)}, "a weight of 31 columns needs a Hessian of that size"),
        ({"hessian": torch.zeros(32, 31)}, "square floating matrix"),
        ({"hessian": torch.eye(32, device="meta")}, "move one of them"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(options: dict, message: str) -> None:
    weight, hessian = oracle.layer(8, 32, seed=13)
    with pytest.raises(ValueError, match=message):
        prune_weight(**{"weight": weight, "hessian": hessian, "pattern": "0.5", **options})
