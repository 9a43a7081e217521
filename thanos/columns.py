"""Structured pruning: which columns go, and the one solve that updates the others for all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.methods import Job
from thanos.pattern import Structured


def columns_to_remove(job: Job, weights: Tensor) -> Tensor:
    """Indices (s,) of the columns of ``weights`` (c, b) with the smallest scores, ties to the lower index."""
    assert isinstance(job.pattern, Structured)
    order = job.method.column_scores(weights, job).argsort(stable=True)
    return order[: job.pattern.columns(weights.shape[1], job.outlier_fraction)]


def remove_columns_jointly(job: Job, work: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns S of ``work`` (c, b) in place and update the kept ones, T.

    ``W_T += W_S Hd[S,T] Hd[T,T]^-1``, the correct form of the paper's equation 13. The damped loss,
    ``tr(W_S (Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]) W_S.T)``, comes from the Schur complement. The form through the
    inverse, ``-W_S G[S,S]^-1 G[S,T]``, needs as many flops for G's rows alone.

    Returns:
        The mask (c, b), bool, and the undamped loss, 0-d float64.
    """
    timed, factor = job.timed, job.factor
    with timed("select"):
        chosen = columns_to_remove(job, work)
        removed = torch.zeros_like(factor.dead).index_fill_(0, chosen, True)
        order, many = removed.argsort(stable=True), len(removed) - len(chosen)
        kept, chosen = order[:many], order[many:]
    with timed("solve"):
        solution, schur, failed = kernels.eliminate(factor.hessian, factor.damping, kept, chosen, backend=job.backend)
        job.info.append(failed)
    with timed("update"):
        leaving = work.index_select(1, chosen)
        change = leaving @ solution.T
        work.index_add_(1, kept, change)
        work.index_fill_(1, chosen, 0)
    with timed("loss"):
        damped_loss = kernels.row_energy(leaving, schur, backend=job.backend).double().sum()
        loss = damped_loss - factor.ridge * (squared(leaving) + squared(change))
    return removed.expand_as(work).clone(), loss


def squared(tensor: Tensor) -> Tensor:
    """The sum of squares, 0-d float64."""
    return torch.linalg.vector_norm(tensor).double().square()
