"""The factor of the inverse and the rows' energies, computed strip by strip, are what their definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos_kernels import linalg, reference

SIZES = [1, 2, 5, 255, 256, 257, 300, 511, 513, 700]


def spd(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    inputs = torch.randn(2 * size + 8, size, dtype=torch.float64)
    return (inputs.T @ inputs / len(inputs)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_squared_is_the_inverse(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    damped = spd(size, dtype)
    wanted, out = damped.double(), damped.clone()
    assert linalg.inverse_factor(out) == 0
    assert not out.tril(-1).any()
    assert reference.inverse_factor(wanted) == 0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [3, 300, 600])
@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_matrix_that_is_not_positive_definite_is_reported(size: int, bad: float) -> None:
    for place in (0, size // 2, size - 1):
        damped = spd(size)
        damped[place, place] = bad
        assert linalg.inverse_factor(damped) != 0


def test_every_trailing_inverse_comes_from_the_factor() -> None:
    torch.manual_seed(0)
    hessian = spd(20)
    factor, dead, damping = kernels.inverse_factor(hessian, 0.01)
    assert damping == 0.01
    assert not dead.any()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    for j in (0, 7, 19):
        inverse = torch.linalg.inv(damped[j:, j:])
        torch.testing.assert_close(factor[j:, j:].T @ factor[j:, j:], inverse)


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    hessian = torch.eye(6, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # smallest eigenvalue -0.05
    factor, _, damping = kernels.inverse_factor(hessian, 0.01)
    assert damping == 0.1
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian + 0.1 * torch.eye(6)))
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(torch.linalg.LinAlgError, match="damping"):
        kernels.inverse_factor(hessian, 0.01)


def test_dead_columns_are_found_and_do_no_harm() -> None:
    hessian = spd(10)
    hessian[4], hessian[:, 4] = 0, 0
    factor, dead, _ = kernels.inverse_factor(hessian, 0.0)
    assert dead.nonzero().flatten().tolist() == [4]
    assert not factor[4, 5:].any()
    assert bool(factor.isfinite().all())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_energy(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights, hessian = torch.randn(7, size, dtype=dtype), spd(size, dtype)
    wanted = reference.row_energy(weights.double(), hessian.double())
    torch.testing.assert_close(linalg.row_energy(weights, hessian).double(), wanted, rtol=1e-4, atol=1e-4)


def rows_and_inputs(kind: str, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (rows, width) and inputs (tokens, width) whose energies rounding disturbs in different ways."""
    torch.manual_seed(len(kind))
    weights, inputs = torch.randn(rows, width), torch.randn(400, width)
    if kind == "correlated":
        inputs += 3 * inputs[:, :1]
    elif kind == "massive features":
        inputs[:, ::97] *= 300
    elif kind == "constant rows":  # every weight of a row is rounded the same way
        weights = torch.linspace(1, 1.2, rows)[:, None].expand(rows, width).contiguous()
    elif kind == "cancelling":  # large rows across the one direction that all inputs share
        inputs += 10
        weights *= torch.linspace(1, 3, rows)[:, None]
        weights -= weights.mean(1, keepdim=True)
    elif kind == "equal rows":
        weights[rows // 2 :] = weights[: rows - rows // 2]
    return weights, inputs


@pytest.mark.parametrize(
    "kind", ["plain", "correlated", "massive features", "constant rows", "cancelling", "equal rows"]
)
@pytest.mark.parametrize("count", [0, 1, 30, 299, 300])
def test_rough_energies_find_the_exact_outlier_rows(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "bfloat16_pays", lambda weights: True)
    weights, inputs = rows_and_inputs(kind, 300, 1100)
    hessian = inputs.T @ inputs / len(inputs)
    outlier = linalg.outlier_rows(weights, hessian, count)
    assert int(outlier.sum()) == count
    energy = reference.row_energy(weights.double(), hessian.double())
    if 0 < count < 300:
        assert energy[outlier].min() >= energy[~outlier].max() * (1 - 1e-5)


@pytest.mark.parametrize("kind", ["plain", "correlated", "massive features", "constant rows", "cancelling"])
def test_rough_energies_err_by_less_than_half_of_what_puts_a_row_in_doubt(kind: str) -> None:
    weights, inputs = rows_and_inputs(kind, 300, 1100)
    hessian = inputs.T @ inputs / len(inputs)
    exact = reference.row_energy(weights.double(), hessian.double())
    error = linalg.row_energy(weights.bfloat16(), hessian.bfloat16()).double() - exact
    scale = exact + weights.double().square() @ hessian.diagonal().double()
    assert (error.abs() / scale).max() < 2**-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eliminate(size: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hessian, order, cut = spd(size, dtype), torch.randperm(size), int(share * size)
    kept, removed = order[cut:], order[:cut]
    solution, schur, info = kernels.eliminate(hessian, 0.01, kept, removed)
    damped = kernels.damp(hessian, 0.01)[0].double()
    expected = torch.linalg.solve(damped[kept][:, kept], damped[kept][:, removed])
    left = damped[removed][:, removed] - damped[removed][:, kept] @ expected
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert int(info) == 0
    torch.testing.assert_close(solution.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(schur.double(), left, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(schur, schur.T)


def test_eliminate_says_where_there_is_no_factor() -> None:
    hessian = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    kept, removed = torch.tensor([0, 1]), torch.tensor([2])
    for backend in ("auto", "reference"):
        assert int(kernels.eliminate(hessian, 0.0, kept, removed, backend=backend)[2]) != 0
