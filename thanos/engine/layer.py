"""Prune one layer: the factor, the sweep over its blocks, and more damping where a factorisation fails.

``naive.py`` is the whole algorithm on one screen; this is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.columns import remove_columns
from thanos.engine.factor import Factor, HessianNotFiniteError, check_hessian, converted, factorise, finite, more_damped
from thanos.engine.mask_search import search_mask
from thanos.engine.methods import METHODS
from thanos.engine.peers import ALONE, Peers
from thanos.engine.refine import refit
from thanos.engine.rounding import round_weights
from thanos.engine.sweep import Attempt, sweep, with_outliers
from thanos.engine.timing import StepTimer, immediate, read
from thanos.options import VALUES, Options
from thanos.pattern import Pattern, Structured, Unstructured
from thanos_kernels.scope import plain_arithmetic
from thanos_kernels.sparse_int8 import TOO_LARGE


@dataclass(frozen=True)
class PrunedWeight:
    """A pruned layer.

    Attributes:
        weight: (c, b), in the dtype of the weight given, exactly zero where ``mask`` is True.
        mask: (c, b), bool, True where pruned.
        loss: ``tr((W' - W) H (W' - W).T)``, the mean squared output error per token, without damping.
        damping: the damping used; more than was asked for where a factorisation failed.
        seconds: time per step: factor, select, solve, update, loss, refine.
        removed: how many weights the mask holds.
        zeros: how many weights are zero, in the dtype given: those removed, and what was zero before or rounds to it.
        energy: ``tr(W H W.T)``, the mean squared output per token, where it was asked for.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float
    seconds: dict[str, float]
    removed: int
    zeros: int
    energy: float | None = None


def prune_weight(
    weight: Tensor, hessian: Tensor | Factor, pattern: Pattern | str | float, **options: Any
) -> PrunedWeight:
    """Prune one linear layer.

    Args:
        weight: (c, b): out features x in features, any floating type; not modified. The work is done in float32, or
            in float64 where the weight or the Hessian is float64.
        hessian: (b, b): ``mean(x x.T)`` of the layer's inputs over tokens, or a :class:`Factor` of it to share, which
            brings its own damping.
        pattern: a share (0.5, ``"50%"``), ``"2:4"``, ``"structured:0.3"`` or a :data:`thanos.Pattern`.
        options: by keyword, those of :class:`thanos.Options`: method, block_size, outlier_fraction, damping, metric,
            refine, values, backend.

    Raises:
        ValueError, TypeError: shapes, patterns or options do not fit, or the weight or Hessian holds NaN or infinity.
        torch.linalg.LinAlgError: the Hessian is not positive definite with any damping up to 1.0.
    """
    return prune_group([weight], hessian, pattern, **options)[0]


def prune_group(
    weights: Sequence[Tensor], hessian: Tensor | Factor, pattern: Pattern | str | float, **options: Any
) -> list[PrunedWeight]:
    """Prune layers that receive the same input, such as a block's q, k and v projections: one factor serves all.

    Arguments and errors as :func:`prune_weight`. The time of the factor is reported by the first layer.
    """
    chosen = Options.of(pattern, **options)
    if not isinstance(weights, Sequence):
        raise TypeError(f"the weights must be a list of tensors, not {type(weights).__name__}")
    if not isinstance(hessian, Factor):
        check_hessian(hessian)
    for weight in weights:
        check_weight(weight, hessian.hessian if isinstance(hessian, Factor) else hessian)
        chosen.check_layer(*weight.shape)
    results = []
    factors: dict[torch.dtype, Factor] = {}
    for weight in weights:
        timed = StepTimer(weight.device)
        given = hessian.hessian if isinstance(hessian, Factor) else hessian
        dtype = torch.promote_types(weight.dtype, torch.promote_types(given.dtype, torch.float32))
        with timed("factor"):
            if dtype not in factors:
                factors[dtype] = factor_for(hessian, dtype, chosen)
        results.append(prune_layer(weight, factors[dtype], chosen, timed))
    return results


def factor_for(hessian: Tensor | Factor, dtype: torch.dtype, options: Options) -> Factor:
    """What layers of a working dtype need of a Hessian: damped, and with its inverse's factor where a step uses it."""
    method = METHODS[options.method]
    joint = isinstance(options.pattern, Structured) and method.joint
    inverse = (method.compensates and not joint) or options.metric == "obs"
    if isinstance(hessian, Factor):
        return converted(hessian, dtype, inverse, options.backend)
    return factorise(hessian.to(dtype), options.damping, options.backend, inverse=inverse)


@plain_arithmetic
def prune_layer(
    weight: Tensor,
    factor: Factor,
    options: Options,
    timed: StepTimer,
    *,
    energy: bool = False,
    peers: Peers = ALONE,
    target: Tensor | None = None,
) -> PrunedWeight:
    """Prune one layer, with more damping of its own for as long as a system or factorisation fails.

    All ``peers`` call it with the same arguments, each prunes a share of the rows, and all get the whole weight; the
    mask holds the rows of this process alone.

    Args:
        weight: (c, b), checked by :func:`check_weight`.
        factor: from :func:`factor_for`, in the working dtype.
        timed: adds up the seconds per step.
        energy: whether to take ``tr(W H W.T)`` too.
        target: (c, b), what is pruned in the place of the weight, such as the corrected one; losses and energy are then
            of it. In the working dtype; the result has the dtype of ``weight``.

    Raises:
        HessianNotFiniteError, ValueError: the Hessian, or the weight, holds NaN or infinity.
        torch.linalg.LinAlgError: as :func:`prune_weight`.
    """
    original = (weight if target is None else target).detach().to(factor.hessian.dtype)
    are_finite = finite(original), finite(factor.hessian)
    if immediate(original):
        _refuse_not_finite(*read(*are_finite))
    total = torch.zeros_like(factor.ridge)
    if energy:
        with timed("loss"):
            own = original if peers.size == 1 else peers.share(original)
            total = kernels.row_energy(own, factor.hessian, backend=options.backend).double().sum()
    while True:
        rows = _rows(original, factor, options, timed, peers)
        attempt = _attempt(original, rows, factor, options, timed, peers, weight.dtype)
        pruned = _joined(weight, rows, attempt.weight, peers)
        # Counts are of bool: twenty times as fast as sums.
        removed_zeros = attempt.mask.count_nonzero(), pruned.eq(0).count_nonzero()
        # The layer's one wait for its device.
        loss, removed, zeros, output, failed, *were_finite = _read_all(
            peers, attempt.loss, *removed_zeros, total, attempt.failed, *are_finite
        )
        _refuse_not_finite(*were_finite)
        if options.rounds and not failed and not math.isfinite(loss):
            raise ValueError(TOO_LARGE)
        if not failed:
            break
        with timed("factor"):
            factor = more_damped(factor, options.backend)
    return PrunedWeight(
        pruned,
        attempt.mask,
        max(0.0, loss),
        factor.damping if METHODS[options.method].compensates or options.refine != "none" else 0.0,
        timed.seconds(),
        int(removed),
        int(zeros) // peers.size,  # all have counted the whole weight
        output if energy else None,
    )


def _rows(weights: Tensor, factor: Factor, options: Options, timed: StepTimer, peers: Peers) -> Tensor | None:
    """The rows that are pruned (n,), those of all peers: all but the outliers; None for all."""
    count = options.outliers(len(weights))
    if count == 0:
        return None if peers.size == 1 else torch.arange(len(weights), dtype=torch.int64, device=weights.device)
    with timed("select"):
        if peers.size == 1:
            outlier = kernels.outlier_rows(weights, factor.hessian, count, backend=options.backend)
        else:
            every = torch.arange(len(weights), dtype=torch.int64, device=weights.device)
            own = kernels.row_energy(peers.share(weights), factor.hessian, backend=options.backend)
            energies = peers.join(every, own, weights.new_empty(len(weights)))
            largest = energies.argsort(descending=True, stable=True)[:count]
            outlier = torch.zeros_like(every, dtype=torch.bool).index_fill_(0, largest, True)
        return outlier.argsort(stable=True)[: len(weights) - count]


def _joined(weight: Tensor, rows: Tensor | None, pruned: Tensor, peers: Peers) -> Tensor:
    """The whole pruned weight, in the dtype of ``weight``, from everybody's share of ``rows``."""
    pruned = pruned.to(weight.dtype)
    if peers.size == 1 or rows is None:
        return pruned
    return peers.join(rows, pruned[peers.share(rows)], pruned)


def _read_all(peers: Peers, *values: Tensor) -> list[float]:
    """The sums of everybody's 0-d ``values``, by one wait."""
    if peers.size == 1:
        return read(*values)
    return list(peers.sum(torch.stack([value.double() for value in values])).cpu().tolist())


def _attempt(
    weights: Tensor,
    rows: Tensor | None,
    factor: Factor,
    options: Options,
    timed: StepTimer,
    peers: Peers,
    dtype: torch.dtype,
) -> Attempt:
    """The layer pruned with the damping of ``factor``; with peers, this process' share of ``rows``."""
    own = rows if rows is None or peers.size == 1 else peers.share(rows)
    joint = isinstance(options.pattern, Structured) and METHODS[options.method].joint
    attempt = (remove_columns if joint else sweep)(weights, own, factor, options, timed, peers)
    if options.refine == "none" and not options.rounds:
        return attempt
    with timed("refine"):
        if own is None or peers.size == 1:
            return _refined(weights, attempt, factor, options, peers, dtype)
        part = attempt._replace(weight=attempt.weight[own], mask=attempt.mask[own])
        part = _refined(weights[own], part, factor, options, peers, dtype)
        return Attempt(*with_outliers(weights, own, part.weight, part.mask), part.loss, part.failed)


def _refined(
    weights: Tensor, attempt: Attempt, factor: Factor, options: Options, peers: Peers, dtype: torch.dtype
) -> Attempt:
    """The attempt after its refinement; the search starts from the refit, so that no stage raises the loss.

    Rounding is last.
    """
    problem = factor.hessian, factor.damping
    if options.refine == "none":
        return _rounded(weights, attempt, factor, options, dtype)
    better = refit(weights, attempt.weight, attempt.mask, *problem, backend=options.backend)
    if options.refine == "admm" and not isinstance(options.pattern, Structured):
        by_row = options.method == "wanda" and isinstance(options.pattern, Unstructured)
        better = search_mask(
            weights,
            better.weight,
            better.mask,
            *problem,
            options.pattern,
            by_row=by_row,
            backend=options.backend,
            peers=peers,
        )
    attempt = attempt._replace(weight=better.weight, mask=better.mask, loss=better.loss_after.sum())
    return _rounded(weights, attempt, factor, options, dtype) if options.rounds else attempt


def _rounded(weights: Tensor, attempt: Attempt, factor: Factor, options: Options, dtype: torch.dtype) -> Attempt:
    """The attempt with int8 values; a method that leaves the other weights alone does not make up for them either."""
    result = round_weights(
        weights,
        attempt.weight,
        attempt.mask,
        factor.hessian,
        factor.damping,
        dtype=dtype,
        largest=VALUES[options.values],
        compensate=METHODS[options.method].compensates or options.refine != "none",
        backend=options.backend,
    )
    return attempt._replace(weight=result.weight, loss=result.loss_after.sum())


def check_weight(weight: Tensor, hessian: Tensor) -> None:
    """Raise ValueError or TypeError unless ``weight`` is a matrix that ``hessian`` (b, b) fits."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight must be a tensor, not {type(weight).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"the weight must be a non-empty floating matrix, not {weight.dtype} {tuple(weight.shape)}")
    if len(hessian) != weight.shape[1]:
        raise ValueError(
            f"a weight of {weight.shape[1]} columns needs a Hessian of that size, not {tuple(hessian.shape)}"
        )
    if hessian.device != weight.device:
        raise ValueError(f"the weight lies on {weight.device} and the Hessian on {hessian.device}: move one of them")


def _refuse_not_finite(weight: float, hessian: float) -> None:
    if not weight:
        raise ValueError("the weight holds NaN or infinity")
    if not hessian:
        raise HessianNotFiniteError
