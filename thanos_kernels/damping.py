"""The damping of a Hessian (docs/method.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thanos_kernels.arguments import output
from thanos_kernels.scope import plain_arithmetic, writing

MAX_DAMPING = 1.0


@plain_arithmetic
def damped_diagonal(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The diagonal of :func:`damp`'s matrix (b,), the dead columns (b,) and the ridge, 0-d."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    live = (~dead).sum()
    mean = torch.where(live > 0, diagonal.sum() / live.clamp(min=1), 1)
    return torch.where(dead, mean, diagonal) + damping * mean, dead, damping * mean


@plain_arithmetic
def damp(hessian: Tensor, damping: float, *, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``Hd = H + ridge I`` with ``ridge = damping * mean(live diagonal)``; a dead column's diagonal becomes that mean.

    Args:
        hessian: (b, b), symmetric. A column is dead where its diagonal is zero: its input is never used.
        damping: relative to the mean of the live diagonal.
        out: (b, b), overwritten; a new tensor if None.

    Returns:
        Hd (b, b), a copy; the dead columns (b,), bool; and the ridge, 0-d.
    """
    diagonal, dead, ridge = damped_diagonal(hessian, damping)
    out = output("out", out, tuple(hessian.shape), hessian, hessian.dtype)
    with writing(out):
        out.copy_(hessian).diagonal().copy_(diagonal)
    return out, dead, ridge


def damping_schedule(damping: float) -> Iterator[float]:
    """The dampings to try, each ten times the one before (after zero, 1e-4), up to 1.0."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a finite number, zero or more, not {damping}")
    yield damping
    while damping < MAX_DAMPING:
        damping = min(MAX_DAMPING, max(10 * damping, 1e-4))
        yield damping
