"""Rows of a layer that are shared out are pruned as if they were together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thanos_kernels as kernels
from tests.peers import together
from thanos.engine.layer import factor_for, prune_layer
from thanos.engine.peers import Peers, select_smallest
from thanos.engine.timing import StepTimer
from thanos.options import Options
from thanos_kernels import native

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="the extension is not built")),
]
KINDS = ("normal", "few values", "equal", "zeros", "denormal", "huge")


def matrix(kind: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    values = torch.randn(rows, columns, dtype=dtype)
    if kind == "few values":
        return values.mul(2).round()
    if kind == "equal":
        return torch.ones_like(values)
    if kind == "zeros":
        return torch.where(values > 0, 0.0, -0.0).to(dtype)
    return values * {"normal": 1.0, "denormal": 1e-41, "huge": 1e37}[kind]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(2, 4), rows=st.integers(4, 20), columns=st.integers(1, 50), data=st.data())
@settings(max_examples=10, deadline=None)
def test_the_mask_of_all_rows(backend: str, kind: str, size: int, rows: int, columns: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    dtype = torch.float64 if backend == "reference" and data.draw(st.booleans()) else torch.float32
    width, count = data.draw(st.integers(0, columns)), data.draw(st.integers(0, rows * columns))
    weights, norms = matrix(kind, rows, columns, dtype), torch.randint(0, 3, (columns,)).to(dtype)
    wanted, taken = kernels.select_smallest(weights, norms, count, width, backend="reference")

    def select(peers: Peers) -> tuple[Tensor, Tensor]:
        return select_smallest(peers.share(weights), norms, count, width, peers, backend)

    found = together(size, select)
    assert torch.cat([mask for mask, _ in found]).equal(wanted)
    assert all(int(one) == int(taken) for _, one in found)


CASES = [
    {"pattern": "0.5"},
    {"pattern": "0.6", "outlier_fraction": 0.1},
    {"pattern": "2:4"},
    {"pattern": "2:4", "outlier_fraction": 0.2, "refine": "refit"},
    {"pattern": "structured:0.3", "outlier_fraction": 0.1},
    {"pattern": "0.5", "method": "sparsegpt"},
    {"pattern": "structured:0.25", "method": "sparsegpt"},
    {"pattern": "2:4", "method": "sparsegpt"},
    {"pattern": "0.5", "method": "wanda"},
    {"pattern": "structured:0.25", "method": "wanda"},
    {"pattern": "0.5", "method": "magnitude"},
    {"pattern": "0.5", "refine": "refit"},
    {"pattern": "0.5", "refine": "admm"},
    {"pattern": "0.5", "method": "wanda", "refine": "admm"},
]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_layer_that_is_shared_out(case: dict[str, object], size: int) -> None:
    torch.manual_seed(3)
    inputs = torch.randn(300, 96) * torch.linspace(0.2, 2, 96)
    inputs[:, 7] = 0
    hessian, weight = inputs.T @ inputs / len(inputs), torch.randn(31, 96).bfloat16()
    options = Options.of(**{"block_size": 32, **case})
    factor = factor_for(hessian, torch.float32, options)
    alone = prune_layer(weight, factor, options, StepTimer(weight.device), energy=True)

    def prune(peers: Peers) -> object:
        return prune_layer(weight, factor, options, StepTimer(weight.device), energy=True, peers=peers)

    found = together(size, prune)
    for one in found:
        assert one.weight.equal(found[0].weight)
        assert one.removed == alone.removed
        assert one.zeros == int((one.weight == 0).sum())
        assert one.loss == found[0].loss
        assert one.loss == pytest.approx(alone.loss, rel=0.02 if case.get("refine") == "admm" else 1e-3)
        assert one.energy == pytest.approx(alone.energy, rel=1e-5)
    if case.get("refine") != "admm":
        assert found[0].weight.eq(0).ne(alone.weight.eq(0)).float().mean() < 0.001
        assert torch.allclose(found[0].weight.float(), alone.weight.float(), rtol=0.02, atol=0.02)


def test_a_layer_that_is_not_finite_or_not_definite() -> None:
    weight, options = torch.randn(8, 16), Options.of("0.5", block_size=8, damping=0.0)
    hessian = torch.ones(16, 16)
    hessian[3, 3] = 2

    def prune(peers: Peers) -> object:
        factor = factor_for(hessian, torch.float32, options)
        return prune_layer(weight, factor, options, StepTimer(weight.device), peers=peers)

    alone = prune_layer(weight, factor_for(hessian, torch.float32, options), options, StepTimer(weight.device))
    assert {one.damping for one in together(2, prune)} == {alone.damping}
    assert alone.damping > 0
    weight[7, 3] = float("nan")
    with pytest.raises(ValueError, match="the weight holds NaN"):
        together(2, prune)
