"""State as values: factors that never change, layers that do not depend on their order, memory that is bounded."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos import factorise, prune_group, prune_weight
from thanos.engine.factor import more_damped


def singular(columns: int) -> Tensor:
    """A Hessian that needs a damping of 0.1."""
    _, hessian = oracle.layer(1, columns, seed=10, tokens=4)
    return hessian - 0.02 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def same(one: Any, two: Any) -> bool:
    return torch.equal(one.weight, two.weight) and torch.equal(one.mask, two.mask) and one.damping == two.damping


@pytest.mark.parametrize("hessian", [oracle.layer(1, 32, seed=9)[1], singular(32)], ids=["definite", "singular"])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
def test_the_order_of_layers_that_share_an_input_does_not_matter(hessian: Tensor, method: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=draw, dtype=torch.float64) for rows in (8, 24, 5)]
    alone = [prune_weight(weight, hessian, "0.5", method=method, block_size=8) for weight in weights]
    for order in itertools.permutations(range(3)):
        group = prune_group([weights[i] for i in order], hessian, "0.5", method=method, block_size=8)
        assert all(same(result, alone[i]) for i, result in zip(order, group, strict=True))


def test_a_layer_that_needs_more_damping_keeps_it_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solves of the layer of 24 rows fail at the damping asked for; its neighbours must not notice."""
    _, hessian = oracle.layer(1, 32, seed=9)
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=draw, dtype=torch.float64) for rows in (8, 24, 5)]
    alone = [prune_weight(weight, hessian, "0.5") for weight in weights]
    alone[1] = prune_weight(weights[1], hessian, "0.5", damping=0.1)
    solve, failures = kernels.row_solve_ex, []

    def failing(gram: Tensor, weight: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, info = solve(gram, weight, mask, **options)
        if len(weight) == 24 and not failures:
            failures.append(info.fill_(1))
        return out, info

    monkeypatch.setattr(kernels, "row_solve_ex", failing)
    for order in itertools.permutations(range(3)):
        failures.clear()
        group = prune_group([weights[i] for i in order], hessian, "0.5")
        assert failures
        assert [group[order.index(i)].damping for i in range(3)] == [0.01, 0.1, 0.01]
        assert all(same(result, alone[i]) for i, result in zip(order, group, strict=True))


def test_a_factor_is_a_value() -> None:
    weight, hessian = oracle.layer(8, 32, seed=1)
    factor = factorise(hessian)
    copy = pickle.loads(pickle.dumps(factor))
    more = more_damped(factor)
    assert (factor.damping, more.damping) == (0.01, 0.1)
    results = [prune_weight(weight, one, "0.5", block_size=8) for one in (hessian, factor, copy)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert factor.upper is not None
    assert copy.upper is not None
    assert torch.equal(factor.upper, copy.upper)
    with pytest.raises(AttributeError):
        factor.damping = 0.5  # type: ignore[misc]


def test_a_factor_serves_other_dtypes_and_methods() -> None:
    weight, hessian = oracle.layer(8, 32, seed=1)
    factor = factorise(hessian.float())
    exact = prune_weight(weight, hessian.float().double(), "0.5", block_size=8)
    assert same(prune_weight(weight, factor, "0.5", block_size=8), exact)
    without = factorise(hessian, inverse=False)
    assert without.upper is None
    assert same(prune_weight(weight, without, "2:4"), prune_weight(weight, hessian, "2:4"))


_MEASURE = """
import sys, torch
from pathlib import Path
from thanos import prune_weight
method, pattern, alpha = sys.argv[1], sys.argv[2], float(sys.argv[3])
torch.manual_seed(0)
size = 1536
prune_weight(torch.randn(64, 64), torch.eye(64), pattern, method=method)  # what is loaded once
weight, inputs = torch.randn(size, size), torch.randn(2 * size, size)
hessian = inputs.T @ inputs / len(inputs)
def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

del inputs
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
prune_weight(weight, hessian, pattern, method=method, outlier_fraction=alpha)
print((status("VmHWM") - before) / (4 * size * size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux")
@pytest.mark.parametrize(
    ("method", "pattern", "alpha"),
    [("thanos", "0.5", 0), ("thanos", "2:4", 0.1), ("thanos", "structured:0.3", 0.1), ("sparsegpt", "0.5", 0)],
)
def test_peak_memory_is_a_few_matrices(method: str, pattern: str, alpha: float) -> None:
    """Beyond weight and Hessian: the copy, U, the mask, what a block takes, and the library's own scratch."""
    arguments = [sys.executable, "-c", _MEASURE, method, pattern, str(alpha)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < 8.5
