"""The pruning methods: how each selects the weights to remove, and how it compensates for them.

A method is one entry of ``METHODS``. Its ``step`` takes one block of columns and returns the mask to remove and the
errors E of docs/method.md, section 3 (None where the method does not compensate); ``sweep.py`` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.factor import Factor
from thanos.engine.peers import ALONE, Peers, select_smallest
from thanos.engine.timing import StepTimer
from thanos.options import Options
from thanos.pattern import Pattern, SemiStructured, Unstructured


@dataclass(frozen=True)
class Block:
    """One block of columns of a weight W as updated so far, and what a method may look at to prune it."""

    options: Options
    factor: Factor
    timed: StepTimer
    trailing: Tensor  # (c, b - start): W from the block's first column on
    start: int
    width: int  # B
    remaining: (
        int | Tensor
    )  # how many weights of the trailing columns are still to be removed, in the rows of all peers
    removed: Tensor | None  # (b,), bool: the columns to remove, where they were chosen beforehand
    rows: int  # of all peers together
    peers: Peers = ALONE

    @property
    def pattern(self) -> Pattern:
        return self.options.pattern

    @property
    def backend(self) -> str:
        return self.options.backend

    @property
    def weights(self) -> Tensor:
        """(c, B)."""
        return self.trailing[:, : self.width]

    @property
    def norms(self) -> Tensor:
        """(b - start,), of the inputs of the trailing columns."""
        return self.factor.norms[self.start :]

    @property
    def v(self) -> Tensor:
        """(B, B), the block of U."""
        stop = self.start + self.width
        return upper(self.factor)[self.start : stop, self.start : stop]

    def chosen(self) -> Tensor | None:
        """The mask (c, B), where it does not depend on the method: whole columns chosen beforehand."""
        if self.removed is None:
            return None
        return self.removed[self.start : self.start + self.width].expand_as(self.weights).contiguous()


class Step(NamedTuple):
    """What a method does to one block.

    Attributes:
        mask: (c, B), bool, the weights to remove.
        errors: E (c, B), or None where nothing is compensated.
        taken: how much of the budget ``Block.remaining`` the mask uses up.
        failed: 0-d bool, whether a system was not positive definite; None where none was solved.
    """

    mask: Tensor
    errors: Tensor | None = None
    taken: int | Tensor = 0
    failed: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        step: one block of columns -> what to remove and how to compensate.
        column_scores: for structured patterns, (weights (c, b), factor, options) -> (b,); the smallest are removed.
        compensates: whether it updates the weights it keeps. One that does not sees the whole layer as one block.
        joint: whether structured pruning solves for all the removed columns at once, not block by block.
    """

    step: Callable[[Block], Step]
    column_scores: Callable[[Tensor, Factor, Options], Tensor]
    compensates: bool = True
    joint: bool = False


def upper(factor: Factor) -> Tensor:
    """U of a factor that was made with it."""
    assert factor.upper is not None
    return factor.upper


def _scales(factor: Factor, options: Options, start: int = 0) -> Tensor:
    """(b - start,): what the metric multiplies each remaining column's abs(w) by.

    The inverse of the Hessian of the remaining columns is ``U[start:, start:].T @ U[start:, start:]``.
    """
    if options.metric == "obs":
        return torch.linalg.vector_norm(upper(factor)[start:, start:], dim=0).reciprocal()
    norms = factor.norms[start:]
    return torch.ones_like(norms) if options.metric == "magnitude" else norms


def _n_of_m(block: Block, pattern: SemiStructured, norms: Tensor) -> Tensor:
    return kernels.select_n_of_m(block.weights.abs() * norms, pattern.n, pattern.m, backend=block.backend)


def _smallest(block: Block, norms: Tensor) -> tuple[Tensor, Tensor]:
    """The block's part of the smallest ``abs(w) * norm`` of all remaining columns, and how many those are."""
    return select_smallest(block.trailing, norms, block.remaining, block.width, block.peers, block.backend)


def _thanos(block: Block) -> Step:
    """The global residual mask, and the errors of least norm: ``E = Lambda V.T``, the paper's ``u R^-1``."""
    taken: int | Tensor = 0
    with block.timed("select"):
        scales = _scales(block.factor, block.options, block.start)
        if isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, scales[: block.width])
        else:
            mask, taken = _smallest(block, scales)
    with block.timed("solve"):
        multipliers, info = kernels.row_solve_ex(block.v.T @ block.v, block.weights, mask, backend=block.backend)
        return Step(mask, multipliers @ block.v.T, taken, info.any())


def _sparsegpt(block: Block) -> Step:
    """The block's share of the smallest ``(w / U_jj)^2``; errors on the removed weights alone, column by column."""
    mask = block.chosen()
    if mask is None and isinstance(block.pattern, SemiStructured):
        with block.timed("solve"):
            n, m = block.pattern.n, block.pattern.m
            errors, mask = kernels.column_sweep_n_of_m(block.v, block.weights, n, m, backend=block.backend)
        return Step(mask, errors)
    if mask is None:
        assert isinstance(block.pattern, Unstructured)
        with block.timed("select"):
            norms, count = block.v.diagonal().reciprocal(), block.pattern.count(block.rows * block.width)
            mask, _ = select_smallest(block.weights, norms, count, block.width, block.peers, block.backend)
    with block.timed("solve"):
        return Step(mask, kernels.column_sweep(block.v, block.weights, mask, backend=block.backend))


def _wanda(block: Block) -> Step:
    """Each row's smallest ``abs(w) * norm``."""
    with block.timed("select"):
        mask = block.chosen()
        if mask is None and isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, block.norms)
        elif mask is None:
            assert isinstance(block.pattern, Unstructured)
            count = block.pattern.count(block.width)
            mask = kernels.select_per_row(block.weights, block.norms, count, backend=block.backend)
    return Step(mask)


def _magnitude(block: Block) -> Step:
    """The layer's smallest ``abs(w)``."""
    with block.timed("select"):
        mask, ones = block.chosen(), torch.ones_like(block.norms)
        if mask is None and isinstance(block.pattern, SemiStructured):
            mask = _n_of_m(block, block.pattern, ones)
        elif mask is None:
            mask, _ = _smallest(block, ones)
    return Step(mask)


def _thanos_columns(weights: Tensor, factor: Factor, options: Options) -> Tensor:
    """``|w_j|^2`` over the rows, times the squared scale of the metric."""
    return weights.square().sum(0) * _scales(factor, options).square()


def _sparsegpt_columns(weights: Tensor, factor: Factor, options: Options) -> Tensor:
    return weights.square().sum(0) / upper(factor).diagonal().square()


def _wanda_columns(weights: Tensor, factor: Factor, options: Options) -> Tensor:
    return weights.abs().sum(0) * factor.norms


def _magnitude_columns(weights: Tensor, factor: Factor, options: Options) -> Tensor:
    return weights.abs().sum(0)


METHODS: dict[str, Method] = {
    "thanos": Method(_thanos, _thanos_columns, joint=True),
    "sparsegpt": Method(_sparsegpt, _sparsegpt_columns),
    "wanda": Method(_wanda, _wanda_columns, compensates=False),
    "magnitude": Method(_magnitude, _magnitude_columns, compensates=False),
}
