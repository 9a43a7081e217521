"""Structured pruning by Thanos: which columns are removed, and the one solve that updates the others for all rows."""

from __future__ import annotations

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.factor import Factor
from thanos.engine.methods import METHODS
from thanos.engine.peers import ALONE, Peers
from thanos.engine.sweep import Attempt, row_parts, squared
from thanos.engine.timing import StepTimer
from thanos.options import Options
from thanos.pattern import Structured


def remove_columns(
    weights: Tensor, rows: Tensor | None, factor: Factor, options: Options, timed: StepTimer, peers: Peers = ALONE
) -> Attempt:
    """Remove columns S of ``rows`` (n,) of ``weights`` (c, b), all rows if None, and update the kept ones, T.

    ``W_T += W_S Hd[S,T] Hd[T,T]^-1``, the correct form of the paper's equation 13. The damped loss,
    ``tr(W_S (Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]) W_S.T)``, comes from the Schur complement. The form through the
    inverse, ``-W_S G[S,S]^-1 G[S,T]``, needs as many flops for G's rows alone. ``peers`` as for :func:`sweep`.
    """
    backend = options.backend
    with timed("select"):
        kept, removed = _choose(weights, rows, factor, options, peers)
    with timed("solve"):
        solution, schur, failed = kernels.eliminate(factor.hessian, factor.damping, kept, removed, backend=backend)
    pruned, loss = weights.clone(), weights.new_zeros((), dtype=torch.float64)
    columns = factor.dead.index_fill(0, removed, True)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    for index, part in row_parts(weights, rows, factor):
        with timed("update"):
            leaving = part.index_select(1, removed)
            change = torch.mm(leaving, solution.T, out=kernels.empty_aligned(len(part), len(kept), part))
            part.index_add_(1, kept, change).index_fill_(1, removed, 0)
            pruned.index_copy_(0, index, part)
            mask.index_copy_(0, index, columns.expand_as(part))
        with timed("loss"):
            loss += kernels.row_energy(leaving, schur, backend=backend).double().sum()
            loss -= factor.ridge * (squared(leaving) + squared(change))
    return Attempt(pruned, mask, loss, failed != 0)


def _choose(
    weights: Tensor, rows: Tensor | None, factor: Factor, options: Options, peers: Peers
) -> tuple[Tensor, Tensor]:
    """Indices of the columns that are kept (t,) and removed (s,): the smallest scores, ties to the lower index."""
    assert isinstance(options.pattern, Structured)
    score, parts = METHODS[options.method].column_scores, row_parts(weights, rows, factor)
    scores = torch.stack([score(part, factor, options) for _, part in parts]).sum(0)
    order = peers.sum(scores).argsort(stable=True)
    count = options.pattern.columns(len(order), options.outlier_fraction)
    removed = torch.zeros_like(factor.dead).index_fill_(0, order[:count], True)
    order = removed.argsort(stable=True)
    return order[: len(order) - count], order[len(order) - count :]
