"""The Triton Hessian update against float64."""

from __future__ import annotations

import pytest
import torch

from thanos_kernels import accumulate_hessian


def tokens(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (5, 17), (33, 64), (70, 150), (32, 144)])
def test_agrees_with_float64(count: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = tokens(count, width, dtype)
    first = torch.full((width, width), float("nan"), device=device)
    accumulate_hessian(first, inputs.to(device), 1.0, backend="triton")
    wanted = inputs.double().T @ inputs.double() / count
    torch.testing.assert_close(first.cpu().double(), wanted, rtol=1e-5, atol=1e-6)

    more = tokens(count, width, dtype, seed=1)
    accumulate_hessian(first, more.to(device), 0.25, backend="triton")
    wanted = 0.75 * wanted + 0.25 * (more.double().T @ more.double()) / count
    torch.testing.assert_close(first.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, first.T)


def test_inputs_of_any_shape_and_strides(device: torch.device) -> None:
    inputs = tokens(24, 40, torch.float32)
    wanted = inputs.double().T @ inputs.double() / 24
    for laid_out in (inputs.reshape(2, 3, 4, 40), inputs.T.contiguous().T, torch.empty(24, 80)[:, ::2].copy_(inputs)):
        hessian = torch.full((40, 40), float("nan"), device=device)
        accumulate_hessian(hessian, laid_out.to(device), 1.0, backend="triton")
        torch.testing.assert_close(hessian.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


def test_hundreds_of_calls_lose_no_low_bits(device: torch.device) -> None:
    width, calls = 20, 250
    hessian = torch.zeros(width, width, device=device)
    wanted = torch.zeros(width, width, dtype=torch.float64)
    for call in range(calls):
        inputs = tokens(3 + call % 5, width, torch.bfloat16, seed=call) + 1
        accumulate_hessian(hessian, inputs.to(device), 1 / (call + 1), backend="triton")
        wanted += (inputs.double().T @ inputs.double() / len(inputs) - wanted) / (call + 1)
    error = (hessian.cpu().double() - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-6  # eight units in the last place


def test_the_diagonal_holds_the_norms(device: torch.device) -> None:
    inputs = tokens(50, 30, torch.bfloat16)
    hessian = torch.empty(30, 30, device=device)
    accumulate_hessian(hessian, inputs.to(device), 1.0, backend="triton")
    torch.testing.assert_close(hessian.diagonal().cpu().sqrt() * 50**0.5, inputs.float().norm(dim=0))
