"""The operations as ``torch.library`` operators, ``torch.ops.thanos.*``, with the shapes of their results.

So they compose with ``torch.compile`` and run under ``FakeTensorMode``, whichever backend is behind them. Arguments are
checked by ``ops.py``; ``backend`` is as there. (``torch.library.custom_op`` would do this in fewer words, but imports
the compiler at the first call, which takes seconds.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thanos_kernels.dispatch import implementation
from thanos_kernels.scope import writing

_LIBRARY = torch.library.Library("thanos", "DEF")
_SCHEMAS = (
    "row_solve(Tensor gram, Tensor weights, Tensor mask, Tensor(a!) out, Tensor(b!) info, int workspace, str backend)"
    " -> ()",
    "select_smallest(Tensor weights, Tensor norms, Tensor count, int width, str backend) -> (Tensor, Tensor)",
    "count_scores(Tensor weights, Tensor norms, Tensor prefix, int shift, int bits, str backend) -> Tensor",
    "select_below(Tensor weights, Tensor norms, Tensor threshold, Tensor ties, int width, str backend)"
    " -> (Tensor, Tensor)",
    "select_per_row(Tensor weights, Tensor norms, int count, str backend) -> Tensor",
    "select_n_of_m(Tensor scores, int n, int m, str backend) -> Tensor",
    "column_sweep(Tensor factor, Tensor weights, Tensor mask, str backend) -> Tensor",
    "column_sweep_n_of_m(Tensor factor, Tensor weights, int n, int m, str backend) -> (Tensor, Tensor)",
    "accumulate_hessian(Tensor(a!) hessian, Tensor inputs, float weight, str backend) -> ()",
)


def _row_solve(
    gram: Tensor, weights: Tensor, mask: Tensor, out: Tensor, info: Tensor, workspace: int, backend: str
) -> None:
    run = implementation("row_solve", backend, weights, gram, mask)
    limit = {"workspace": workspace} if workspace and run.__module__.startswith("thanos_kernels.triton.") else {}
    with writing(out, info):
        run(gram, weights, mask, out, info, **limit)


def _select_smallest(weights: Tensor, norms: Tensor, count: Tensor, width: int, backend: str) -> Any:
    return implementation("select_smallest", backend, weights, norms)(weights, norms, count, width)


def _count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, shift: int, bits: int, backend: str) -> Any:
    return implementation("count_scores", backend, weights, norms)(weights, norms, prefix, shift, bits)


def _select_below(weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int, backend: str) -> Any:
    return implementation("select_below", backend, weights, norms)(weights, norms, threshold, ties, width)


def _select_per_row(weights: Tensor, norms: Tensor, count: int, backend: str) -> Any:
    return implementation("select_per_row", backend, weights, norms)(weights, norms, count)


def _select_n_of_m(scores: Tensor, n: int, m: int, backend: str) -> Any:
    return implementation("select_n_of_m", backend, scores, group=m)(scores, n, m)


def _column_sweep(factor: Tensor, weights: Tensor, mask: Tensor, backend: str) -> Any:
    return implementation("column_sweep", backend, weights, factor, mask)(factor, weights, mask)


def _column_sweep_n_of_m(factor: Tensor, weights: Tensor, n: int, m: int, backend: str) -> Any:
    return implementation("column_sweep_n_of_m", backend, weights, factor, group=m)(factor, weights, n, m)


def _accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float, backend: str) -> None:
    with writing(hessian):
        implementation("accumulate_hessian", backend, hessian, inputs)(hessian, inputs, weight)


def _nothing(*arguments: Any) -> None:
    """The fake of an operator that only writes into its arguments."""


def _mask(like: Tensor, width: int) -> Tensor:
    return like.new_empty((like.shape[0], width), dtype=torch.bool)


def _fake_select_smallest(weights: Tensor, norms: Tensor, count: Tensor, width: int, backend: str) -> Any:
    return _mask(weights, width), weights.new_empty((), dtype=torch.int64)


def _fake_count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, shift: int, bits: int, backend: str) -> Tensor:
    return weights.new_empty(1 << bits, dtype=torch.int64)


def _fake_select_below(
    weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int, backend: str
) -> Any:
    return _mask(weights, width), weights.new_empty((), dtype=torch.int64)


def _fake_select_per_row(weights: Tensor, norms: Tensor, count: int, backend: str) -> Tensor:
    return _mask(weights, weights.shape[1])


def _fake_select_n_of_m(scores: Tensor, n: int, m: int, backend: str) -> Tensor:
    return _mask(scores, scores.shape[1])


def _fake_column_sweep(factor: Tensor, weights: Tensor, mask: Tensor, backend: str) -> Tensor:
    return weights.new_empty(weights.shape)


def _fake_column_sweep_n_of_m(factor: Tensor, weights: Tensor, n: int, m: int, backend: str) -> Any:
    return weights.new_empty(weights.shape), _mask(weights, weights.shape[1])


_FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "row_solve": (_row_solve, _nothing),
    "select_smallest": (_select_smallest, _fake_select_smallest),
    "count_scores": (_count_scores, _fake_count_scores),
    "select_below": (_select_below, _fake_select_below),
    "select_per_row": (_select_per_row, _fake_select_per_row),
    "select_n_of_m": (_select_n_of_m, _fake_select_n_of_m),
    "column_sweep": (_column_sweep, _fake_column_sweep),
    "column_sweep_n_of_m": (_column_sweep_n_of_m, _fake_column_sweep_n_of_m),
    "accumulate_hessian": (_accumulate_hessian, _nothing),
}
for schema in _SCHEMAS:
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
for name, (real, fake) in _FUNCTIONS.items():
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"thanos::{name}", fake, lib=_LIBRARY)

row_solve = torch.ops.thanos.row_solve.default
select_smallest = torch.ops.thanos.select_smallest.default
count_scores = torch.ops.thanos.count_scores.default
select_below = torch.ops.thanos.select_below.default
select_per_row = torch.ops.thanos.select_per_row.default
select_n_of_m = torch.ops.thanos.select_n_of_m.default
column_sweep = torch.ops.thanos.column_sweep.default
column_sweep_n_of_m = torch.ops.thanos.column_sweep_n_of_m.default
accumulate_hessian = torch.ops.thanos.accumulate_hessian.default
