"""The Triton row solve against the reference in float64, its padding, its reports and its workspace."""

from __future__ import annotations

import pytest
import torch

from thanos_kernels import reference, row_solve, row_solve_ex
from thanos_kernels.triton import row_solve as kernels


def gram_matrix(width: int, seed: int = 0) -> torch.Tensor:
    """(B, B), positive definite, condition number in the hundreds."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width + 8, width, generator=draw)
    return inputs.T @ inputs / len(inputs) + 0.05 * torch.eye(width)


def expected(gram: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    out, info = torch.empty(weights.shape, dtype=torch.float64), torch.empty(len(weights), dtype=torch.int32)
    reference.row_solve(gram.double(), weights.double(), mask, out, info)
    assert not info.any()
    return out


def solve(
    gram: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, device: torch.device, workspace: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into outputs that hold NaN and -1."""
    out = torch.full(weights.shape, float("nan"), device=device)
    info = torch.full((len(weights),), -1, dtype=torch.int32, device=device)
    row_solve_ex(
        gram.to(device), weights.to(device), mask.to(device), out=out, info=info, workspace=workspace, backend="triton"
    )
    return out.cpu(), info.cpu()


def counts_mask(counts: list[int], width: int) -> torch.Tensor:
    """One row for each count, its columns drawn at random."""
    order = torch.rand(len(counts), width, generator=torch.Generator().manual_seed(1)).argsort(1)
    return order < torch.tensor(counts)[:, None]


@pytest.mark.parametrize(
    ("width", "counts"),
    [
        (1, [0, 1]),
        (7, [0, 3, 7]),
        (33, [0, 1, 16, 17, 32, 33]),  # the edges of the first two tiles
        (100, [0, 64, 65, 96, 97, 100]),
        (128, [128]),
        (130, [129, 130]),  # the edge between registers and tiles in memory
        (300, [5, 160]),
        (512, [256]),
    ],
)
def test_agrees_with_the_reference(width: int, counts: list[int], device: torch.device) -> None:
    gram, mask = gram_matrix(width), counts_mask(counts, width)
    weights = torch.randn(len(counts), width, generator=torch.Generator().manual_seed(2))
    out, info = solve(gram, weights, mask, device)
    assert not info.any()
    assert not out[~mask].any()
    torch.testing.assert_close(out.double(), expected(gram, weights, mask), rtol=2e-5, atol=2e-5)


def test_counts_up_to_the_limits_reach_every_bucket() -> None:
    assert kernels.LIMITS == (32, 64, 96, 128)
    assert kernels.MAX_WIDTH == 2048


def test_rows_are_independent_of_their_neighbours_and_order(device: torch.device) -> None:
    gram, mask = gram_matrix(70), counts_mask([40, 3, 66, 0, 20], 70)
    weights = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    together, _ = solve(gram, weights, mask, device)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted, _ = solve(gram, weights[order], mask[order], device)
    assert torch.equal(permuted, together[order])


@pytest.mark.parametrize("layout", ["transposed", "strided", "far apart"])
def test_any_strides(layout: str, device: torch.device) -> None:
    gram, mask = gram_matrix(20), counts_mask([9, 20, 4], 20)
    weights = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    if layout == "transposed":
        laid_out, laid_mask = weights.T.contiguous().T, mask.T.contiguous().T
    elif layout == "strided":
        laid_out = torch.empty(6, 60)[::2, ::3].copy_(weights)
        laid_mask = torch.empty(6, 60, dtype=torch.bool)[::2, ::3].copy_(mask)
    else:  # rows further apart than 2^31 bytes; what lies between is never touched
        laid_out = torch.empty(2 * (1 << 29) + 64).as_strided((3, 20), (1 << 29, 1)).copy_(weights)
        laid_mask = mask
    out, _ = solve(gram, laid_out, laid_mask, device)
    torch.testing.assert_close(out.double(), expected(gram, weights, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [40, 140])
def test_a_system_that_is_not_positive_definite_is_reported_by_row(width: int, device: torch.device) -> None:
    gram, bad = gram_matrix(width), width - 5
    gram[bad, bad] = -1.0
    mask = torch.ones(3, width, dtype=torch.bool)
    mask[1, bad] = False
    mask[2] = False
    weights = torch.randn(3, width, generator=torch.Generator().manual_seed(5))
    out, info = solve(gram, weights, mask, device)
    assert info.tolist() == [bad + 1, 0, 0]
    assert not out[0].any()
    torch.testing.assert_close(out[1:2].double(), expected(gram, weights[1:2], mask[1:2]), rtol=1e-4, atol=1e-4)
    with pytest.raises(torch.linalg.LinAlgError, match="row 0"):
        row_solve(gram.to(device), weights.to(device), mask.to(device), backend="triton")


@pytest.mark.parametrize("width", [30, 150])
def test_a_small_workspace_changes_nothing_but_the_chunks(width: int, device: torch.device) -> None:
    gram, mask = gram_matrix(width), counts_mask([width, 2, width // 2], width)
    weights = torch.randn(3, width, generator=torch.Generator().manual_seed(6))
    whole, _ = solve(gram, weights, mask, device)
    chunked, info = solve(gram, weights, mask, device, workspace=1)
    assert torch.equal(chunked, whole)
    assert not info.any()


def test_accuracy_is_that_of_float32(device: torch.device) -> None:
    """Plain TF32, with its 11 bits, would be some thousand times off."""
    gram, mask = gram_matrix(140, seed=7), torch.ones(1, 140, dtype=torch.bool)
    weights = torch.randn(1, 140, generator=torch.Generator().manual_seed(8))
    wanted = expected(gram, weights, mask)
    out, _ = solve(gram, weights, mask, device)
    by_pytorch = torch.linalg.solve(gram, weights.T).T
    error, its_error = ((have.double() - wanted).norm() for have in (out, by_pytorch))
    assert error < 4 * its_error
