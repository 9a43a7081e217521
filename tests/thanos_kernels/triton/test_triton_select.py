"""Selection by the Triton kernels: equal to the reference to the last tie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from thanos_kernels import (
    count_scores,
    reference,
    score_digits,
    select_below,
    select_n_of_m,
    select_per_row,
    select_smallest,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ADVERSARIAL: dict[str, Callable[[], torch.Tensor]] = {
    "normal": lambda: normal(13, 90),
    "all equal": lambda: torch.full((9, 70), 0.25),
    "few values": lambda: normal(11, 80).mul(2).round(),
    "denormals": lambda: normal(7, 50) * 1e-43,
    "zeros of both signs": lambda: torch.where(normal(8, 40) > 0, 0.0, -0.0),
    "huge and tiny": lambda: normal(6, 64) * 10.0 ** torch.arange(-37, 37, 74 / 64),
    "one row": lambda: normal(1, 300),
    "one column": lambda: normal(70, 1),
    "one element": lambda: normal(1, 1),
}


def compare_smallest(weights: torch.Tensor, norms: torch.Tensor, count: int, width: int, device: torch.device) -> None:
    wanted, wanted_taken = reference.select_smallest(weights, norms, count, width)
    on_device = torch.tensor(count, device=device)
    mask, taken = select_smallest(weights.to(device), norms.to(device), on_device, width, backend="triton")
    assert torch.equal(mask.cpu(), wanted)
    assert taken.shape == ()
    assert taken.dtype == torch.int64
    assert taken.device.type == device.type
    assert int(taken) == int(wanted_taken)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_select_smallest(name: str, device: torch.device) -> None:
    weights = ADVERSARIAL[name]()
    columns, norms = weights.shape[1], torch.ones(weights.shape[1])
    if name == "normal":
        norms = normal(columns, seed=1).abs()
    for count in sorted({0, 1, weights.numel() // 3, weights.numel()}):
        compare_smallest(weights, norms, count, max(1, columns // 2), device)


@pytest.mark.parametrize("name", ["transposed", "trailing columns", "rows far apart"])
def test_select_smallest_of_any_strides(name: str, device: torch.device) -> None:
    weights = normal(12, 60)
    if name == "transposed":
        weights = weights.T
    elif name == "trailing columns":
        weights = weights[:, 17:]
    else:
        weights = torch.empty(2 * (1 << 29) + 64).as_strided((3, 60), (1 << 29, 1)).copy_(weights[:3])
    compare_smallest(weights, torch.ones(weights.shape[1]), weights.numel() // 2, 9, device)


def test_the_blocks_of_a_sweep_take_the_whole_budget(device: torch.device) -> None:
    """What is left of the budget never leaves the device."""
    weights, norms = normal(10, 64).to(device), torch.ones(64, device=device)
    remaining = torch.tensor(301, device=device)
    for start in range(0, 64, 24):
        width = min(24, 64 - start)
        _, taken = select_smallest(weights[:, start:], norms[start:], remaining, width, backend="triton")
        remaining = remaining - taken
    assert int(remaining) == 0


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_counts_and_masks_by_a_threshold(name: str, device: torch.device) -> None:
    weights = ADVERSARIAL[name]()
    columns = weights.shape[1]
    norms, scores = torch.ones(columns), weights.abs().flatten().view(torch.int32).long()
    wanted = scores.kthvalue(max(1, len(scores) // 2)).values
    for digit, (shift, bits) in enumerate(score_digits(torch.float32)):
        prefix = wanted >> (shift + bits)
        counts = count_scores(weights.to(device), norms.to(device), prefix.to(device), digit, backend="triton")
        assert torch.equal(counts.cpu(), reference.count_scores(weights, norms, prefix, shift, bits))
    for ties in (0, 1, len(scores) // 2, 1 << 40):
        given = wanted, torch.tensor(ties), max(1, columns // 2)
        expected = reference.select_below(weights, norms, *given)
        found = select_below(
            weights.to(device), norms.to(device), *(one.to(device) for one in given[:2]), given[2], backend="triton"
        )
        assert torch.equal(found[0].cpu(), expected[0])
        assert int(found[1]) == int(expected[1])


@pytest.mark.parametrize("count", [0, 1, 20, 40])
@pytest.mark.parametrize("name", ["few values", "all equal", "zeros of both signs", "huge and tiny"])
def test_select_per_row(name: str, count: int, device: torch.device) -> None:
    weights = ADVERSARIAL[name]()[:, :40]
    norms = torch.ones(40) if name != "few values" else torch.arange(40.0)
    mask = select_per_row(weights.to(device), norms.to(device), count, backend="triton")
    assert torch.equal(mask.cpu(), reference.select_per_row(weights, norms, count))


def test_select_per_row_of_rows_longer_than_a_tile(device: torch.device) -> None:
    weights, norms = normal(3, 1100).mul(8).round(), torch.ones(1100)
    mask = select_per_row(weights.to(device), norms.to(device), 500, backend="triton")
    assert torch.equal(mask.cpu(), reference.select_per_row(weights, norms, 500))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (16, 32), (0, 4), (4, 4), (1, 1), (7, 31)])
def test_select_n_of_m(n: int, m: int, device: torch.device) -> None:
    for scores in (normal(5, 9 * m).mul(3).round(), normal(9 * m, 4).T, torch.full((2, m), float("-0.0"))):
        mask = select_n_of_m(scores.to(device), n, m, backend="triton")
        assert torch.equal(mask.cpu(), reference.select_n_of_m(scores, n, m))
