"""Prune one layer: select, compensate, update, block by block of columns (docs/method.md, section 3).

With ``U.T @ U`` the inverse of the damped Hessian and V = U[j:e, j:e], every method handles the columns [j, e) alike:
it *selects* a mask, *compensates* by errors E with ``V[:, q].T @ e = w[q]`` for each row's removed columns q, and the
*update* ``W[:, j:] -= E @ U[j:e, j:]`` then makes those weights zero. The damped loss of a layer is ``sum(E^2)``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.columns import ROWS_AT_ONCE, columns_to_remove, remove_columns_jointly, row_parts, squared
from thanos.engine.factor import Factor
from thanos.engine.methods import Block, Job, check_metric, method_named
from thanos.engine.timing import StepTimer
from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured, parse_pattern

_NOT_FINITE = "the weight or the Hessian holds NaN or infinity"


@dataclass(frozen=True)
class PrunedWeight:
    """A pruned layer.

    Attributes:
        weight: (c, b), in the dtype of the weight given, exactly zero where ``mask`` is True.
        mask: (c, b), bool, True where pruned.
        loss: ``tr((W' - W) H (W' - W).T)``, the mean squared output error per token, without damping.
        damping: the damping used; more than was asked for where a factorisation failed.
        seconds: time per step: factor, select, solve, update, loss.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float
    seconds: dict[str, float]


def prune_weight(
    weight: Tensor,
    hessian: Tensor | Factor,
    pattern: Pattern | str,
    *,
    method: str = "thanos",
    block_size: int | None = None,
    outlier_fraction: float = 0.0,
    damping: float = 0.01,
    metric: str | None = None,
    backend: str = "auto",
) -> PrunedWeight:
    """Prune one linear layer.

    Args:
        weight: (c, b): out features x in features, any floating type; not modified. The work is done in float32, or
            in float64 where the weight or the Hessian is float64.
        hessian: (b, b): ``mean(x x.T)`` of the layer's inputs over tokens, or a :class:`Factor` of it to share.
        pattern: ``Unstructured(0.5)``, ``SemiStructured(2, 4)``, ``Structured(0.3)``, or text for ``parse_pattern``.
        method: ``thanos``, ``sparsegpt``, ``wanda`` or ``magnitude``.
        block_size: columns per block, B; 128, or 512 for n:m. A multiple of m.
        outlier_fraction: alpha: the ``ceil(alpha c)`` rows with the largest ``(W H W.T)_ii`` are left untouched.
        damping: added to the Hessian's diagonal, relative to its mean (a Factor brings its own).
        metric: what Thanos chooses its mask by: ``wanda``, ``abs(w) * norm`` of the input (the paper's, and what None
            means); ``obs``, ``w^2 / [H^-1]_jj`` of the columns that remain; or ``magnitude``.
        backend: of the operations: ``auto``, ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError: shapes, patterns or options do not fit, or the weight or Hessian holds NaN or infinity.
        torch.linalg.LinAlgError: the Hessian is not positive definite with any damping up to 1.0.
    """
    return prune_group(
        [weight],
        hessian,
        pattern,
        method=method,
        block_size=block_size,
        outlier_fraction=outlier_fraction,
        damping=damping,
        metric=metric,
        backend=backend,
    )[0]


def prune_group(
    weights: Sequence[Tensor],
    hessian: Tensor | Factor,
    pattern: Pattern | str,
    *,
    method: str = "thanos",
    block_size: int | None = None,
    outlier_fraction: float = 0.0,
    damping: float = 0.01,
    metric: str | None = None,
    backend: str = "auto",
) -> list[PrunedWeight]:
    """Prune layers that receive the same input, such as a block's q, k and v projections: one factor serves all.

    Arguments and errors as :func:`prune_weight`. The time of the factor is reported by the layer that needed it first.
    """
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    chosen = method_named(method)
    check_metric(metric, method)
    size = _block_size(pattern, block_size)
    factor = hessian if isinstance(hessian, Factor) else Factor(hessian, damping, backend)
    for weight in weights:
        _check_weight(weight, factor.hessian)
        check_pattern(pattern, len(weight), weight.shape[1], outlier_fraction)
    results = []
    for weight in weights:
        own = factor.to(torch.promote_types(weight.dtype, factor.hessian.dtype))
        job = Job(chosen, pattern, own, size, outlier_fraction, backend, metric or "wanda", StepTimer(weight.device))
        results.append(_prune(job, weight))
    return results


def check_pattern(pattern: Pattern, rows: int, columns: int, outlier_fraction: float) -> None:
    """Raise ValueError where a layer of ``rows`` x ``columns`` cannot be pruned so."""
    if not 0 <= outlier_fraction < 1:
        raise ValueError(f"outlier fraction must be at least 0 and less than 1, not {outlier_fraction}")
    if _outliers(rows, outlier_fraction) == rows:
        raise ValueError(f"outlier fraction {outlier_fraction:g} makes each of the layer's {rows} rows an outlier")
    pattern.validate(rows, columns, outlier_fraction)


def check_options(
    pattern: Pattern,
    method: str,
    block_size: int | None,
    outlier_fraction: float,
    damping: float,
    metric: str | None = None,
) -> None:
    """Raise ValueError where the options of :func:`prune_weight` could suit no layer."""
    method_named(method)
    check_metric(metric, method)
    _block_size(pattern, block_size)
    next(kernels.damping_schedule(damping))
    if not isinstance(pattern, SemiStructured):
        check_pattern(pattern, sys.maxsize, 1, outlier_fraction)


def _outliers(rows: int, outlier_fraction: float) -> int:
    return math.ceil(Fraction(repr(float(outlier_fraction))) * rows)


def _block_size(pattern: Pattern, block_size: int | None) -> int:
    m = pattern.m if isinstance(pattern, SemiStructured) else 1
    if block_size is None:
        return 128 if m == 1 else max(m, 512 // m * m)
    if block_size < 1:
        raise ValueError(f"block size must be at least 1, not {block_size}")
    if block_size % m:
        raise ValueError(f"block size must be a multiple of {m} for pattern {pattern}, not {block_size}")
    return block_size


def _check_weight(weight: Tensor, hessian: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"the weight must be a non-empty floating matrix, not {weight.dtype} {tuple(weight.shape)}")
    if len(hessian) != weight.shape[1]:
        raise ValueError(
            f"a weight of {weight.shape[1]} columns needs a Hessian of that size, not {tuple(hessian.shape)}"
        )
    if hessian.device != weight.device:
        raise ValueError(f"the weight lies on {weight.device} and the Hessian on {hessian.device}: move one of them")


def _prune(job: Job, weight: Tensor) -> PrunedWeight:
    """Prune one layer, with more damping for as long as a factorisation fails."""
    while True:
        pruned, mask, loss, finite = _attempt(job, weight)
        failed = torch.cat([report.flatten() for report in [*job.info, *job.factor.info, finite.new_zeros(1)]]).any()
        values = torch.stack([loss, finite, failed]).tolist()  # the layer's one wait for its device
        if not values[1]:
            raise ValueError(_NOT_FINITE)
        if not values[2]:
            damping = job.factor.damping if job.method.compensates else 0.0
            return PrunedWeight(pruned, mask, max(0.0, values[0]), damping, job.timed.seconds())
        job.info.clear()
        job.factor.raise_damping()


def _attempt(job: Job, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pruned weight and its mask (c, b), the undamped loss and whether the input was finite, both 0-d."""
    factor = job.factor
    original = weight.to(factor.hessian.dtype)
    finite = _finite(original) & _finite(factor.hessian)
    if finite.device.type == "cpu" and not finite:
        raise ValueError(_NOT_FINITE)
    rows = None
    if job.outlier_fraction > 0:
        with job.timed("select"):
            rows = _rows_to_prune(job, original)
    if isinstance(job.pattern, Structured) and job.method.joint:
        pruned, removed, loss = remove_columns_jointly(job, original, rows)
        mask = removed.expand(len(weight) if rows is None else len(rows), -1).clone()
    else:
        work, mask, loss = _remove_by_blocks(job, original, rows)
        pruned = work.to(weight.dtype)
        if rows is not None:
            pruned = weight.clone().index_copy_(0, rows, pruned)
    mask |= factor.dead
    if rows is not None:
        mask = torch.zeros_like(weight, dtype=torch.bool).index_copy_(0, rows, mask)
    return pruned.to(weight.dtype), mask, loss, finite


def _remove_by_blocks(job: Job, original: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Prune a copy of ``original[rows]`` (n, b), all rows if None: the copy, its mask and the loss, 0-d float64."""
    work = job.factor.without_dead_(original.clone() if rows is None else original[rows])
    columns = work.shape[1]
    size = job.block_size if job.method.compensates else columns
    removed = None
    if job.method.compensates:
        with job.timed("factor"):
            upper = job.factor.upper
    if isinstance(job.pattern, Structured):
        with job.timed("select"):
            removed = torch.zeros_like(job.factor.dead).index_fill_(0, columns_to_remove(job, [work]), True)
    mask, loss = torch.empty_like(work, dtype=torch.bool), work.new_zeros((), dtype=torch.float64)
    remaining: int | Tensor = job.pattern.count(work.numel()) if isinstance(job.pattern, Unstructured) else 0
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        block = Block(job, work[:, start:], start, stop - start, remaining, removed)
        mask[:, start:stop], errors = job.method.step(block)  # select and compensate
        remaining = block.remaining
        with job.timed("update"):
            if errors is not None:
                block.trailing.addmm_(errors, upper[start:stop, start:], alpha=-1)
                loss += squared(errors)
    before = row_parts(original, rows, job.factor)
    for after, gone, (_, change) in zip(work.split(ROWS_AT_ONCE), mask.split(ROWS_AT_ONCE), before, strict=True):
        with job.timed("update"):
            after.mul_(gone.logical_not()).add_(0)  # adding turns -0 into 0; filling by a mask takes thrice as long
        with job.timed("loss"):
            change -= after
            if job.method.compensates:
                loss -= job.factor.ridge * squared(change)
            else:
                loss += kernels.row_energy(change, job.factor.hessian, backend=job.backend).double().sum()
    return work, mask, loss


def _rows_to_prune(job: Job, weights: Tensor) -> Tensor:
    """Indices of all rows but the ``ceil(alpha c)`` outlier rows, those with the largest ``(W H W.T)_ii``."""
    count = _outliers(len(weights), job.outlier_fraction)
    outlier = kernels.outlier_rows(weights, job.factor.hessian, count, backend=job.backend)
    return outlier.argsort(stable=True)[: len(weights) - count]


def _finite(tensor: Tensor) -> Tensor:
    """0-d bool: no NaN and no infinity, in one pass and without a temporary."""
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()
