"""Structured pruning: which columns go, and the one solve that updates the others for all rows at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.factor import Factor
from thanos.engine.methods import Job
from thanos.pattern import Structured

ROWS_AT_ONCE = 512  # what a step makes of so many rows stays in a processor's cache


def row_parts(weights: Tensor, rows: Tensor | None, factor: Factor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of ``rows`` (n,) of ``weights`` (c, b) at a time, all rows if None: their indices and a copy.

    The copies are zero in the dead columns of ``factor``.
    """
    rows = torch.arange(len(weights), device=weights.device) if rows is None else rows
    for part in rows.split(ROWS_AT_ONCE):
        yield part, factor.without_dead_(weights.index_select(0, part))


def columns_to_remove(job: Job, parts: Iterable[Tensor]) -> Tensor:
    """Indices (s,) of the columns with the smallest scores over the rows of ``parts``, ties to the lower index."""
    assert isinstance(job.pattern, Structured)
    order = torch.stack([job.method.column_scores(part, job) for part in parts]).sum(0).argsort(stable=True)
    return order[: job.pattern.columns(len(order), job.outlier_fraction)]


def remove_columns_jointly(job: Job, weights: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Remove columns S of ``rows`` of ``weights`` (c, b), all rows if None, and update the kept ones, T.

    ``W_T += W_S Hd[S,T] Hd[T,T]^-1``, the correct form of the paper's equation 13. The damped loss,
    ``tr(W_S (Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]) W_S.T)``, comes from the Schur complement. The form through the
    inverse, ``-W_S G[S,S]^-1 G[S,T]``, needs as many flops for G's rows alone.

    Returns:
        The pruned weights (c, b), the removed columns (b,), bool, and the undamped loss, 0-d float64.
    """
    timed, factor = job.timed, job.factor
    with timed("select"):
        chosen = columns_to_remove(job, (part for _, part in row_parts(weights, rows, factor)))
        removed = torch.zeros_like(factor.dead).index_fill_(0, chosen, True)
        order, many = removed.argsort(stable=True), len(removed) - len(chosen)
        kept, chosen = order[:many], order[many:]
    with timed("solve"):
        solution, schur, failed = kernels.eliminate(factor.hessian, factor.damping, kept, chosen, backend=job.backend)
        job.info.append(failed)
    pruned, loss = weights.clone(), weights.new_zeros((), dtype=torch.float64)
    for index, part in row_parts(weights, rows, factor):
        with timed("update"):
            leaving = part.index_select(1, chosen)
            change = torch.mm(leaving, solution.T, out=kernels.empty_aligned(len(part), many, part))
            part.index_add_(1, kept, change).index_fill_(1, chosen, 0)
            pruned.index_copy_(0, index, part)
        with timed("loss"):
            loss += kernels.row_energy(leaving, schur, backend=job.backend).double().sum()
            loss -= factor.ridge * (squared(leaving) + squared(change))
    return pruned, removed, loss


def squared(tensor: Tensor) -> Tensor:
    """The sum of squares, 0-d float64."""
    return torch.linalg.vector_norm(tensor).double().square()
