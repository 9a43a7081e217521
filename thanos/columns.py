"""Structured pruning: which columns go, and the one solve that updates the others for all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos.methods import Job
from thanos.pattern import Structured

_STRIP = 512  # columns per product with a triangle


def columns_to_remove(job: Job, weights: Tensor) -> Tensor:
    """Indices (s,) of the columns of ``weights`` (c, b) with the smallest scores, ties to the lower index."""
    assert isinstance(job.pattern, Structured)
    order = job.method.column_scores(weights, job).argsort(stable=True)
    return order[: job.pattern.columns(weights.shape[1], job.outlier_fraction)]


def remove_columns_jointly(job: Job, work: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns S of ``work`` (c, b) in place and update the kept ones, T.

    ``W_T += W_S Hd[S,T] Hd[T,T]^-1``, the correct form of the paper's equation 13. With T in front of S, one Cholesky
    factorisation of the reordered Hessian holds it all: ``Hd[S,T] Hd[T,T]^-1 = L[S,T] L[T,T]^-1``, and the damped loss,
    ``tr(W_S (Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]) W_S.T)``, is ``|W_S L[S,S]|^2``. Flops: b^3/3 + s t^2 + 2 c s t +
    c s^2. The form through the inverse, ``-W_S G[S,S]^-1 G[S,T]``, needs as many for G's rows alone.

    Returns:
        The mask (c, b), bool, and the undamped loss, 0-d float64.
    """
    timed, width = job.timed, work.shape[1]
    with timed("select"):
        chosen = columns_to_remove(job, work)
        removed = torch.zeros_like(job.factor.dead).index_fill_(0, chosen, True)
        order, many = removed.argsort(stable=True), width - len(chosen)
        kept, chosen = order[:many], order[many:]
    with timed("factor"):
        lower, failed = torch.linalg.cholesky_ex(job.factor.damped(order))
        job.info.append(failed)
    with timed("solve"):
        shared = torch.linalg.solve_triangular(lower[:many, :many], lower[many:, :many], upper=False, left=False)
        shared = shared.contiguous()  # the product below is faster by a tenth
    with timed("update"):
        leaving = work.index_select(1, chosen)
        change = leaving @ shared
        work.index_add_(1, kept, change)
        work.index_fill_(1, chosen, 0)
    with timed("loss"):
        damped_loss = squared(change.new_zeros(()))
        for start in range(many, width, _STRIP):  # past the zeros above the diagonal
            damped_loss += squared(leaving[:, start - many :] @ lower[start:, start : start + _STRIP])
        loss = damped_loss - job.factor.ridge * (squared(leaving) + squared(change))
    return removed.expand_as(work).clone(), loss


def squared(tensor: Tensor) -> Tensor:
    """The sum of squares, 0-d float64."""
    return torch.linalg.vector_norm(tensor).double().square()
