"""The pruning methods: how each selects the weights to remove, and how it compensates for them.

A method is one entry of ``METHODS``. Its ``step`` takes one block of columns and returns the mask to remove and the
errors E of docs/method.md, section 3 (None where the method does not compensate); ``layer.py`` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.factor import Factor
from thanos.engine.timing import StepTimer
from thanos.pattern import Pattern, SemiStructured, Unstructured


@dataclass(frozen=True)
class Job:
    """How one layer is to be pruned, and what was noted on the way."""

    method: Method
    pattern: Pattern
    factor: Factor
    block_size: int
    outlier_fraction: float
    backend: str
    metric: str  # of Thanos' mask
    timed: StepTimer
    info: list[Tensor] = field(default_factory=list)  # of the solves: non-zero where one was not positive definite


@dataclass
class Block:
    """One block of columns of a weight W as updated so far, and what a method may look at to prune it."""

    job: Job
    trailing: Tensor  # (c, b - start): W from the block's first column on
    start: int
    width: int  # B
    remaining: int | Tensor  # how many weights of the trailing columns are still to be removed
    removed: Tensor | None  # (b,), bool: the columns to remove, where they were chosen beforehand

    @property
    def pattern(self) -> Pattern:
        return self.job.pattern

    @property
    def weights(self) -> Tensor:
        """(c, B)."""
        return self.trailing[:, : self.width]

    @property
    def norms(self) -> Tensor:
        """(b - start,), of the inputs of the trailing columns."""
        return self.job.factor.norms[self.start :]

    @property
    def v(self) -> Tensor:
        """(B, B), the block of U."""
        stop = self.start + self.width
        return self.job.factor.upper[self.start : stop, self.start : stop]

    def chosen(self) -> Tensor | None:
        """The mask (c, B), where it does not depend on the method: whole columns chosen beforehand."""
        if self.removed is None:
            return None
        return self.removed[self.start : self.start + self.width].expand_as(self.weights).contiguous()


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        step: one block of columns -> mask (c, B), bool, and E (c, B) or None.
        column_scores: for structured patterns, (weights (c, b), job) -> (b,); the smallest are removed.
        compensates: whether it updates the weights it keeps. One that does not sees the whole layer as one block.
        joint: whether structured pruning solves for all the removed columns at once, not block by block.
    """

    step: Callable[[Block], tuple[Tensor, Tensor | None]]
    column_scores: Callable[[Tensor, Job], Tensor]
    compensates: bool = True
    joint: bool = False


METRICS = ("wanda", "obs", "magnitude")
"""What Thanos may choose its mask by: |w| * norm of the input, the optimal brain surgeon's w^2 / [H^-1]_jj, or |w|."""


def _scales(block: Block) -> Tensor:
    """(b - start,): what the metric multiplies each remaining column's abs(w) by.

    The inverse of the Hessian of the remaining columns is ``U[start:, start:].T @ U[start:, start:]``.
    """
    metric, start = block.job.metric, block.start
    if metric == "obs":
        return torch.linalg.vector_norm(block.job.factor.upper[start:, start:], dim=0).reciprocal()
    return block.norms if metric == "wanda" else torch.ones_like(block.norms)


def _n_of_m(block: Block, pattern: SemiStructured, norms: Tensor) -> Tensor:
    return kernels.select_n_of_m(block.weights.abs() * norms, pattern.n, pattern.m, backend=block.job.backend)


def _thanos(block: Block) -> tuple[Tensor, Tensor]:
    """The global residual mask, and the errors of least norm: ``E = Lambda V.T``, the paper's ``u R^-1``."""
    with block.job.timed("select"):
        scales = _scales(block)
        if isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, scales[: block.width])
        else:
            mask, taken = kernels.select_smallest(
                block.trailing, scales, block.remaining, block.width, backend=block.job.backend
            )
            block.remaining = block.remaining - taken
    with block.job.timed("solve"):
        multipliers, info = kernels.row_solve_ex(block.v.T @ block.v, block.weights, mask, backend=block.job.backend)
        block.job.info.append(info)
        return mask, multipliers @ block.v.T


def _sparsegpt(block: Block) -> tuple[Tensor, Tensor]:
    """The block's share of the smallest ``(w / U_jj)^2``; errors on the removed weights alone, column by column."""
    mask = block.chosen()
    if mask is None and isinstance(block.pattern, SemiStructured):
        with block.job.timed("solve"):
            n, m = block.pattern.n, block.pattern.m
            errors, mask = kernels.column_sweep_n_of_m(block.v, block.weights, n, m, backend=block.job.backend)
        return mask, errors
    if mask is None:
        assert isinstance(block.pattern, Unstructured)
        with block.job.timed("select"):
            norms, count = block.v.diagonal().reciprocal(), block.pattern.count(block.weights.numel())
            mask, _ = kernels.select_smallest(block.weights, norms, count, block.width, backend=block.job.backend)
    with block.job.timed("solve"):
        return mask, kernels.column_sweep(block.v, block.weights, mask, backend=block.job.backend)


def _wanda(block: Block) -> tuple[Tensor, None]:
    """Each row's smallest ``abs(w) * norm``."""
    with block.job.timed("select"):
        mask = block.chosen()
        if mask is None and isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, block.norms)
        elif mask is None:
            assert isinstance(block.pattern, Unstructured)
            count = block.pattern.count(block.width)
            mask = kernels.select_per_row(block.weights, block.norms, count, backend=block.job.backend)
    return mask, None


def _magnitude(block: Block) -> tuple[Tensor, None]:
    """The layer's smallest ``abs(w)``."""
    with block.job.timed("select"):
        mask, ones = block.chosen(), torch.ones_like(block.norms)
        if mask is None and isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, ones)
        elif mask is None:
            mask, _ = kernels.select_smallest(
                block.weights, ones, block.remaining, block.width, backend=block.job.backend
            )
    return mask, None


def _thanos_columns(weights: Tensor, job: Job) -> Tensor:
    """``|w_j|^2`` over the rows, times the squared scale of the metric."""
    block = Block(job, weights, 0, weights.shape[1], 0, None)
    return weights.square().sum(0) * _scales(block).square()


METHODS: dict[str, Method] = {
    "thanos": Method(_thanos, _thanos_columns, joint=True),
    "sparsegpt": Method(_sparsegpt, lambda w, job: w.square().sum(0) / job.factor.upper.diagonal().square()),
    "wanda": Method(_wanda, lambda w, job: w.abs().sum(0) * job.factor.norms, compensates=False),
    "magnitude": Method(_magnitude, lambda w, job: w.abs().sum(0), compensates=False),
}


def check_metric(metric: str | None, method: str) -> None:
    """Raise ValueError unless the metric is None or one of ``METRICS`` for Thanos."""
    if metric is None:
        return
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    if method != "thanos":
        raise ValueError(f"metric is an option of the method thanos; {method} has its own")


def method_named(name: str) -> Method:
    """The entry of ``METHODS``; a ValueError that lists them for any other name."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {name!r}")
    return METHODS[name]
