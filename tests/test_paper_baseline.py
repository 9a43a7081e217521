"""The baseline that the benchmarks time is the paper's algorithm: it gives what the engine gives."""

from __future__ import annotations

import pytest
import torch
from oracle import layer

from benchmarks import paper
from thanos import prune_weight


@pytest.mark.parametrize(("rows", "columns", "block"), [(24, 40, 8), (7, 50, 16), (33, 20, 128)])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_it_agrees_with_the_reference(rows: int, columns: int, block: int, sparsity: float) -> None:
    weight, hessian = layer(rows, columns, seed=3)
    expected = prune_weight(weight, hessian, str(sparsity), block_size=block, backend="reference")
    before = weight.clone()
    pruned, mask = paper.prune(weight, hessian, sparsity, block_size=block)
    assert torch.equal(mask, expected.mask)
    assert not pruned[mask].any()
    torch.testing.assert_close(pruned, expected.weight, rtol=1e-9, atol=1e-9)
    assert torch.equal(weight, before)


def test_batches_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(20, 32, seed=4)
    whole, _ = paper.prune(weight, hessian, 0.5, block_size=8)
    monkeypatch.setattr(paper, "_CHUNK_ELEMENTS", 3 * 8 * 32)
    parts, _ = paper.prune(weight, hessian, 0.5, block_size=8)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_dead_columns_are_pruned() -> None:
    weight, hessian = layer(6, 16, seed=5)
    hessian[:, 3] = hessian[3] = 0
    expected = prune_weight(weight, hessian, "0.5", block_size=4, backend="reference")
    pruned, mask = paper.prune(weight, hessian, 0.5, block_size=4)
    assert mask[:, 3].all()
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(pruned, expected.weight, rtol=1e-9, atol=1e-9)
