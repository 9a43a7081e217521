"""The sweep over a layer's blocks of columns: select, compensate, update (docs/method.md, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.factor import Factor
from thanos.engine.methods import METHODS, Block, Method, upper
from thanos.engine.peers import ALONE, Peers
from thanos.engine.timing import StepTimer
from thanos.options import Options
from thanos.pattern import Structured, Unstructured

ROWS_AT_ONCE = 512  # what a step makes of so many rows stays in a processor's cache


class Attempt(NamedTuple):
    """A layer pruned with one damping.

    Attributes:
        weight: (c, b), outlier rows included.
        mask: (c, b), bool, True where pruned.
        loss: 0-d float64, without damping.
        failed: 0-d bool: whether a factorisation or a system was not positive definite; the rest is worthless then.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor
    failed: Tensor


def sweep(
    weights: Tensor, rows: Tensor | None, factor: Factor, options: Options, timed: StepTimer, peers: Peers = ALONE
) -> Attempt:
    """Prune ``rows`` (n,) of ``weights`` (c, b), all if None, block by block; the others are left untouched.

    With ``peers``, each of whom prunes rows of its own, loss and failure are those of this process' rows.
    """
    method = METHODS[options.method]
    work = factor.without_dead_(weights.clone() if rows is None else weights[rows])
    columns = None
    if isinstance(options.pattern, Structured):
        with timed("select"):
            chosen = peers.sum(method.column_scores(work, factor, options)).argsort(stable=True)
            chosen = chosen[: options.pattern.columns(len(chosen), options.outlier_fraction)]
            columns = torch.zeros_like(factor.dead).index_fill_(0, chosen, True)
    mask, loss, failed = _remove(work, columns, method, factor, options, timed, peers)
    before = row_parts(weights, rows, factor)
    for after, removed, (_, change) in zip(work.split(ROWS_AT_ONCE), mask.split(ROWS_AT_ONCE), before, strict=True):
        with timed("update"):
            _zero(after, removed)
        with timed("loss"):
            change -= after
            loss += _undamped(change, method, factor, options)
    mask |= factor.dead
    return Attempt(*with_outliers(weights, rows, work, mask), loss, failed)


def _remove(
    work: Tensor,
    columns: Tensor | None,
    method: Method,
    factor: Factor,
    options: Options,
    timed: StepTimer,
    peers: Peers,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep over ``work`` (n, b) in place: the mask, the damped loss ``sum(E^2)`` and whether a system failed."""
    width = work.shape[1]
    size = options.width if method.compensates else width
    mask = torch.empty_like(work, dtype=torch.bool)
    loss, failed = work.new_zeros((), dtype=torch.float64), factor.failed != 0
    rows = peers.total(len(work))
    remaining: int | Tensor = options.pattern.count(rows * width) if isinstance(options.pattern, Unstructured) else 0
    for start in range(0, width, size):
        stop = min(start + size, width)
        block = Block(options, factor, timed, work[:, start:], start, stop - start, remaining, columns, rows, peers)
        step = method.step(block)  # select and compensate
        mask[:, start:stop] = step.mask
        remaining = remaining - step.taken
        failed = failed if step.failed is None else failed | step.failed
        if step.errors is not None:
            with timed("update"):
                block.trailing.addmm_(step.errors, upper(factor)[start:stop, start:], alpha=-1)
                loss += squared(step.errors)
    return mask, loss, failed


def _zero(weights: Tensor, mask: Tensor) -> None:
    """Exact zeros at the mask. Adding turns -0 into 0; filling by a mask takes three times as long."""
    weights.mul_(mask.logical_not()).add_(0)


def _undamped(change: Tensor, method: Method, factor: Factor, options: Options) -> Tensor:
    """What some rows' ``change`` (n, b) adds to the damped loss to make it the undamped one, 0-d float64."""
    if method.compensates:
        return -factor.ridge * squared(change)
    return kernels.row_energy(change, factor.hessian, backend=options.backend).double().sum()


def row_parts(weights: Tensor, rows: Tensor | None, factor: Factor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of ``rows`` (n,) of ``weights`` (c, b) at a time, all rows if None: their indices and a copy.

    The copies are zero in the dead columns of ``factor``.
    """
    rows = torch.arange(len(weights), dtype=torch.int64, device=weights.device) if rows is None else rows
    for part in rows.split(ROWS_AT_ONCE):
        yield part, factor.without_dead_(weights.index_select(0, part))


def with_outliers(weights: Tensor, rows: Tensor | None, pruned: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The whole weight (c, b) and its mask from those of ``rows``; the other rows are as they were."""
    if rows is None:
        return pruned, mask
    whole = torch.zeros_like(weights, dtype=torch.bool)
    return weights.clone().index_copy_(0, rows, pruned), whole.index_copy_(0, rows, mask)


def squared(tensor: Tensor) -> Tensor:
    """The sum of squares, 0-d float64."""
    return torch.linalg.vector_norm(tensor).double().square()
