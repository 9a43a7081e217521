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
    order = job.method.column_scores(weights, job.factor).argsort(stable=True)
    return order[: job.pattern.columns(weights.shape[1], job.outlier_fraction)]


def remove_columns_jointly(job: Job, work: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns S of ``work`` (c, b) in place and update the kept ones, T.

    ``W_T += W_S Hd[S,T] Hd[T,T]^-1``, the correct form of the paper's equation 13; the damped loss is
    ``tr(W_S (Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]) W_S.T)``. Through the kept side it costs ``t^3/3 + 2 s t^2`` flops
    before the products with the weights. The other side, ``-W_S G[S,S]^-1 G[S,T]``, first needs rows of the inverse:
    ``b^3/3 + 2 s b^2``, which is never less.

    Returns:
        The mask (c, b), bool, and the damped loss, 0-d float64.
    """
    timed, width = job.timed, work.shape[1]
    with timed("select"):
        chosen = columns_to_remove(job, work)
        removed = torch.zeros_like(job.factor.dead).index_fill_(0, chosen, True)
        order = removed.argsort(stable=True)
        kept, chosen = order[: width - len(chosen)], order[width - len(chosen) :]
    with timed("factor"):
        damped = job.factor.damped()
        cross = damped[kept[:, None], chosen]
        inner = damped[chosen[:, None], chosen]
        lower, failed = torch.linalg.cholesky_ex(damped[kept[:, None], kept])
        job.info.append(failed)
        del damped
    with timed("solve"):
        half = torch.linalg.solve_triangular(lower, cross, upper=False)  # L^-1 Hd[T,S]
        inner.addmm_(half.T, half, alpha=-1)
        shared = torch.linalg.solve_triangular(lower.T, half, upper=True)  # Hd[T,T]^-1 Hd[T,S]
        del lower, half, cross
    with timed("update"):
        leaving = work[:, chosen]
        work.index_add_(1, kept, leaving @ shared.T)
        work.index_fill_(1, chosen, 0)
    with timed("loss"):
        loss = kernels.row_energy(leaving, inner, backend=job.backend).double().sum()
    return removed.expand_as(work).clone(), loss
