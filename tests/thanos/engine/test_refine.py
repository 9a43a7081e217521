"""A refit reaches the masked least-squares optimum, keeps what it must, and never raises the loss."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thanos_kernels as kernels
from thanos import prune_weight
from thanos.engine.methods import METHODS
from thanos.engine.refine import refit

quick = settings(max_examples=15, deadline=None)


def row_losses(target: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    change = (weight - target).double()
    return torch.einsum("ij,jk,ik->i", change, hessian.double(), change)


@pytest.mark.parametrize(
    ("share", "block", "sweeps"), [(0.5, 5, 300), (0.8, 4, 300), (0.5, 16, 1), (0.0, 7, 3), (1.0, 7, 3)]
)
def test_many_sweeps_reach_the_masked_least_squares_optimum(share: float, block: int, sweeps: int) -> None:
    weight, hessian = oracle.layer(6, 14, seed=0)
    mask = torch.rand(6, 14, generator=torch.Generator().manual_seed(1)) < share
    full = oracle.damped(hessian, 0.01)
    result = refit(weight, weight.masked_fill(mask, 0), mask, full, 0.0, sweeps=sweeps, block_size=block)
    best = oracle.least_squares(weight, full, mask, damping=0.0)
    torch.testing.assert_close(result.weight, best, rtol=1e-6, atol=1e-6)


@quick
@given(
    method=st.sampled_from(sorted(METHODS)),
    pattern=st.sampled_from(["0.5", "0.8", "2:4", "structured:0.3"]),
    alpha=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10**6),
    sweeps=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_refit_keeps_the_mask_and_never_raises_a_rows_loss(
    method: str, pattern: str, alpha: float, seed: int, sweeps: int, dtype: torch.dtype
) -> None:
    weight, hessian = (tensor.to(dtype) for tensor in oracle.layer(15, 48, seed))
    pruned = prune_weight(weight, hessian, pattern, method=method, outlier_fraction=alpha, block_size=16)
    target = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    result = refit(target, pruned.weight, pruned.mask, hessian, 0.01, sweeps=sweeps, block_size=16)
    again = refit(target, pruned.weight, pruned.mask, hessian, 0.01, sweeps=sweeps, block_size=16)
    before, after = (row_losses(target, each, hessian) for each in (pruned.weight, result.weight))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.equal(result.weight, again.weight)
    assert (result.weight[pruned.mask] == 0).all()
    assert (after <= before * (1 + tolerance)).all()
    assert (result.loss_after <= result.loss_before).all()
    torch.testing.assert_close(result.loss_before, before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.loss_after, after, rtol=tolerance, atol=tolerance)
    untouched = ~pruned.mask.any(1)
    assert torch.equal(result.weight[untouched], pruned.weight[untouched])


def test_more_sweeps_lower_the_loss_and_a_row_does_not_see_the_others() -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(20, 96, seed=1))
    pruned = prune_weight(weight, hessian, "0.5", block_size=16)
    losses = [
        float(refit(weight, pruned.weight, pruned.mask, hessian, 0.01, sweeps=n, block_size=16).loss_after.sum())
        for n in range(5)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
    whole = refit(weight, pruned.weight, pruned.mask, hessian, 0.01)
    alone = refit(weight[3:4], pruned.weight[3:4], pruned.mask[3:4], hessian, 0.01)
    torch.testing.assert_close(alone.weight, whole.weight[3:4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_dead_columns_stay_zero(alpha: float) -> None:
    weight, hessian = oracle.layer(10, 32, seed=2)
    dead = torch.tensor([0, 7, 31])
    hessian[dead], hessian[:, dead] = 0, 0
    pruned = prune_weight(weight, hessian, "2:4", outlier_fraction=alpha, block_size=8)  # of one block nothing is left
    result = refit(weight, pruned.weight, pruned.mask, hessian, 0.01)
    assert torch.equal(result.weight[:, dead], pruned.weight[:, dead])
    assert (result.loss_after <= result.loss_before).all()
    assert result.loss_after.sum() < 0.99 * result.loss_before.sum()


def test_a_start_that_is_best_already_comes_back_bit_for_bit() -> None:
    weight, hessian = oracle.layer(10, 32, seed=3)
    pruned = prune_weight(weight, hessian, "structured:0.3", damping=0.0)
    result = refit(weight, pruned.weight, pruned.mask, hessian, 0.1)
    assert torch.equal(result.weight, pruned.weight), "with more damping the undamped loss could only rise"


@pytest.mark.skipif("native" not in kernels.backends(), reason="the C++ extension is not built")
def test_native_agrees_with_the_reference() -> None:
    weight, hessian = (tensor.float() for tensor in oracle.layer(37, 130, seed=4))
    pruned = prune_weight(weight, hessian, "0.6")
    given = (weight, pruned.weight, pruned.mask, hessian, 0.01)
    native, plain = refit(*given, backend="native"), refit(*given, backend="reference")
    torch.testing.assert_close(native.weight, plain.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(native.loss_after, plain.loss_after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweeps": -1}, "sweeps must be at least 0"),
        ({"block_size": 0}, "block size at least 1"),
        ({"mask": torch.zeros(4, 8)}, "the mask must be torch.bool"),
        ({"pruned": torch.zeros(4, 7)}, "the pruned weight must be"),
        ({"hessian": torch.eye(7)}, "the Hessian must be"),
        ({"target": torch.zeros(4, 8).bfloat16()}, "the target must be a float32 or float64 matrix"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(change: dict, message: str) -> None:
    zeros = torch.zeros(4, 8)
    given = {"target": zeros, "pruned": zeros, "mask": zeros.bool(), "hessian": torch.eye(8), "damping": 0.01}
    with pytest.raises(ValueError, match=message):
        refit(**{**given, **change})
