"""SparseGPT's sweep by the Triton kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from thanos_kernels import column_sweep, column_sweep_n_of_m, reference


def block(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An upper triangular factor and the weights of a block."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width + 3, width, generator=draw)
    covariance = inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(width)
    return torch.linalg.cholesky(torch.linalg.inv(covariance)).T, torch.randn(rows, width, generator=draw)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (40, 70), (3, 128)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sweep(rows: int, width: int, share: float, device: torch.device) -> None:
    factor, weights = block(rows, width)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(1)) < share
    strided = weights.T.contiguous().T
    errors = column_sweep(factor.to(device), strided.to(device), mask.to(device), backend="triton").cpu()
    assert not errors[~mask].any()
    wanted = reference.column_sweep(factor.double(), weights.double(), mask)
    torch.testing.assert_close(errors.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "n", "m"),
    [(1, 4, 2, 4), (34, 72, 2, 4), (3, 60, 2, 5), (3, 64, 16, 32), (2, 9, 0, 3), (2, 6, 3, 3)],
)
def test_sweep_n_of_m(rows: int, width: int, n: int, m: int, device: torch.device) -> None:
    factor, weights = block(rows, width)
    errors, mask = column_sweep_n_of_m(factor.to(device), weights.to(device), n, m, backend="triton")
    wanted, wanted_mask = reference.column_sweep_n_of_m(factor.double(), weights.double(), n, m)
    assert torch.equal(mask.cpu(), wanted_mask)
    assert (mask.unflatten(1, (-1, m)).sum(2) == n).all()
    torch.testing.assert_close(errors.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_equal_scores_go_to_the_lower_index(device: torch.device) -> None:
    factor, weights = torch.eye(8, device=device), torch.ones(2, 8, device=device)
    _, mask = column_sweep_n_of_m(factor, weights, 2, 4, backend="triton")
    assert mask.cpu().tolist() == [[True, True, False, False] * 2] * 2
