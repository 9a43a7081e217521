"""A better mask by the alternating direction method of multipliers, ADMM (docs/method.md, section 9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.engine.peers import ALONE, Peers, select_smallest
from thanos.engine.refine import Refined, check_layer, refit
from thanos.pattern import Pattern, SemiStructured, Structured

_STRIP = 512
_SWEEPS = 4  # of the refit at the end, which takes little beside the rounds


@dataclass(frozen=True)
class Schedule:
    """How a mask search goes on.

    Attributes:
        rho: the first stage's penalty, relative to the unit diagonal of the normalised Hessian.
        stages: at most so many; each factors one matrix.
        rounds: projections in a stage.
        growth: what rho is multiplied by where a stage exchanged more than 10%, more than 0.5%, or less of the kept
            weights.

    Raises:
        ValueError: numbers that cannot be.
    """

    rho: float = 0.03
    stages: int = 5
    rounds: int = 8
    growth: tuple[float, float, float] = (2.2, 1.7, 1.3)

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf") or self.stages < 0 or self.rounds < 1 or not min(self.growth) >= 1:
            raise ValueError(f"a mask search needs rho above 0, rounds and growth from 1 on; not {self}")

    def next_rho(self, rho: float, exchanged: float) -> float:
        """The penalty of the stage after one that exchanged this share of the kept weights."""
        return rho * self.growth[0 if exchanged > 0.1 else 1 if exchanged > 0.005 else 2]


def search_mask(
    target: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Tensor,
    damping: float,
    pattern: Pattern,
    *,
    by_row: bool = False,
    schedule: Schedule | None = None,
    sweeps: int = _SWEEPS,
    backend: str = "auto",
    peers: Peers = ALONE,
) -> Refined:
    """Exchange removed weights for kept ones where that lowers the layer loss, then :func:`refit` what is kept.

    With ``n = sqrt(diag(Hd))``, ``A = Hd / (n n.T)`` and ``B0 = target * n``, minimise ``tr((B - B0) A (B - B0).T)``
    subject to B = Z, Z of the pattern. A round is ``B = B0 + rho (Z - B0 - u) P`` with ``P = inverse(A + rho I)``, then
    ``T = B + u``, Z = the largest of T by the pattern, u = T - Z: Z and u are the two parts of one matrix.

    Args:
        target, pruned, mask, hessian, damping, sweeps: as for :func:`refit`, but for the default of sweeps. Rows
            without a True in ``mask`` (outlier rows) are returned as they are.
        pattern: what ``mask`` obeys. Unstructured: the layer keeps its count. n:m: each group. Structured: the columns
            stay, only the refit runs.
        by_row: unstructured with the same count in every row (Wanda's): every row keeps it.
        schedule: ``Schedule()`` if None.
        peers: others with rows of the same layer; they search together.

    Returns:
        A weight and a mask of the same pattern and count. A row (n:m, ``by_row``) or else the whole layer whose
        undamped loss did not fall below that of ``pruned`` is the refit of ``pruned`` instead.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
    """
    check_layer(target, pruned, mask, hessian)
    schedule = schedule or Schedule()
    rows = mask.any(1).nonzero()[:, 0]
    if isinstance(pattern, Structured) or schedule.stages == 0 or peers.total(len(rows)) == 0:
        return refit(target, pruned, mask, hessian, damping, sweeps=sweeps, backend=backend)
    start = refit(target, pruned, mask, hessian, damping, sweeps=0, backend=backend)
    goal, first, first_mask = target[rows], pruned[rows], mask[rows]
    select = _selection(pattern, first_mask, by_row, backend, peers)
    guess, found_mask = _search(goal, first, first_mask, hessian, damping, select, schedule, backend, peers)
    found = refit(goal, guess, found_mask, hessian, damping, sweeps=sweeps, backend=backend)

    lower = found.loss_after < start.loss_before[rows]
    if not (by_row or isinstance(pattern, SemiStructured)):  # rows exchange weights: all of them or none
        sums = peers.sum(torch.stack([found.loss_after.sum(), start.loss_before[rows].sum()]))
        lower = (sums[0] < sums[1]).expand_as(lower)
    weight, mask, after = pruned.clone(), mask.clone(), start.loss_before.clone()
    better, others = lower.nonzero()[:, 0], rows[~lower]
    weight[rows[better]], mask[rows[better]] = found.weight[better], found.mask[better]
    after[rows[better]] = found.loss_after[better]
    if len(others):
        own = refit(target[others], pruned[others], mask[others], hessian, damping, sweeps=sweeps, backend=backend)
        weight[others], after[others] = own.weight, own.loss_after
    return Refined(weight, mask, start.loss_before, after)


def _selection(
    pattern: Pattern, mask: Tensor, by_row: bool, backend: str, peers: Peers
) -> Callable[[Tensor, Tensor], Tensor]:
    """(magnitudes (n, b), norms (b,)) -> the mask of the smallest, by the pattern and with the counts of ``mask``."""
    if isinstance(pattern, SemiStructured):
        n, m = pattern.n, pattern.m
        return lambda sizes, norms: kernels.select_n_of_m(sizes * norms, n, m, backend=backend)
    if by_row:
        counts = mask.sum(1)
        count = int(counts[0]) if len(counts) else 0
        if bool((counts != count).any()):
            raise ValueError("by_row needs a mask with the same count in every row that is pruned")
        return lambda sizes, norms: kernels.select_per_row(sizes, norms, count, backend=backend)
    total, width = peers.total(int(mask.sum())), mask.shape[1]
    return lambda sizes, norms: select_smallest(sizes, norms, total, width, peers, backend)[0]


def _search(
    target: Tensor,
    pruned: Tensor,
    mask: Tensor,
    hessian: Tensor,
    damping: float,
    select: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    backend: str,
    peers: Peers,
) -> tuple[Tensor, Tensor]:
    """A weight (n, b) and its mask at the end of the stages; the first guess if a stage cannot be factored."""
    damped, dead, _ = kernels.damp(hessian, damping)
    scale = damped.diagonal().sqrt()
    normal = damped.div_(scale).div_(scale[:, None])
    live, tiny = (~dead).to(target.dtype), torch.finfo(target.dtype).tiny
    goal = torch.where(dead, 0, target * scale)
    both, rho, carried = pruned * scale, schedule.rho, 1.0  # both: Z where kept, u where pruned
    sizes = torch.empty_like(both)
    kept_count = peers.total(mask.numel() - int(mask.sum()))
    for stage in range(schedule.stages):
        upper, _, info = kernels.inverse_factor_ex(normal, rho, backend=backend)
        if peers.total(int(info)):
            break
        fast = stage < schedule.stages - 1 and kernels.bfloat16_pays(both)
        inverse = _scaled_inverse(upper, rho)
        inverse = inverse.bfloat16() if fast else inverse
        before = mask
        removed = both * mask  # products: a fifth of the time of torch.where on a CPU
        both.sub_(removed).add_(removed, alpha=carried)
        for _ in range(schedule.rounds):
            torch.mul(both, mask, out=removed)
            wanted = torch.sub(both, removed, alpha=2, out=both).sub_(goal)
            moved = wanted.to(inverse.dtype) @ inverse
            both, removed = removed.add_(goal).add_(moved), both
            mask = select(torch.abs(both, out=sizes).clamp_(min=tiny), live) | dead
        exchanged = peers.total(int((before & ~mask).sum())) / max(1, kept_count)
        if exchanged == 0:
            break
        later = schedule.next_rho(rho, exchanged)
        rho, carried = later, rho / later
    return torch.where(mask, 0, both).div_(scale), mask


def _scaled_inverse(upper: Tensor, scale: float) -> Tensor:
    """``scale * U.T @ U`` of an upper triangular U (b, b), a strip of rows at a time: a third of a dense product."""
    product = torch.zeros_like(upper)
    for start in range(0, len(upper), _STRIP):
        strip = upper[start : start + _STRIP, start:]
        product[start:, start:].addmm_(strip.T, strip, alpha=scale)
    return product
