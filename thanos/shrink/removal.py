"""Remove whole columns of a layer's weight, the cheapest first, with the exact update of the others (docs/method.md).

With G the inverse of the damped Hessian and N = W.T W, removing column p costs ``N_pp / G_pp``, and the best update of
the other columns is a step of elimination, ``W -= W_p G_p: / G_pp`` and ``G -= G_:p G_p: / G_pp``. Then N changes by
three outer products of the columns ``G_:p`` and ``N_:p`` alone, so W itself need not be touched until all is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BATCH = 64  # columns removed between two looks at all columns
_CANDIDATES = 2  # times as many are looked at


@dataclass(frozen=True)
class Removal:
    """Columns removed from a weight.

    Attributes:
        weight: (c, b), updated, exactly zero in the removed columns.
        removed: (s,), int64: their indices, in the order of removal.
        loss: the damped loss ``tr((W' - W) Hd (W' - W).T)``.
    """

    weight: Tensor
    removed: Tensor
    loss: float


def cheapest_columns(weight: Tensor, upper: Tensor, count: int, metric: Tensor | None = None) -> Tensor:
    """Choose ``count`` columns greedily, one at a time, by the loss that removing each adds.

    The columns of G and N that a removal needs are brought up to date for the 128 cheapest columns at a time, by
    products with all removals so far; the scores ``diag(N) / diag(G)`` of all columns are kept exactly. About
    ``3 b s^2 + 2 b^2 s + 2 c b s`` multiply-adds for s columns where b x b updates would take ``3 b^2 s``, in their
    place in memory.

    Args:
        weight: (c, b), float32 or float64.
        upper: (b, b), U with ``U.T U = G``, upper triangular, in the same dtype.
        count: s, less than b.
        metric: (c, c), positive semi-definite: the loss of an output error e is ``e.T metric e``; None is the identity.

    Returns:
        (s,), int64: the columns, in the order of removal. Equal costs go to the lower index.
    """
    columns = weight.shape[1]
    work = weight if metric is None else metric @ weight
    diag_g, diag_n = upper.square().sum(0), (weight * work).sum(0)
    steps_g = upper.new_empty((count, columns))  # rows: G_:p / sqrt(G_pp) at the time of each removal
    steps_n = upper.new_empty((count, columns))  # rows: A with N' = N - A g.T - g A.T
    chosen: list[int] = []
    alive = torch.ones(columns, dtype=torch.bool, device=weight.device)
    while len(chosen) < count:
        score = torch.where(alive, diag_n / diag_g, torch.inf)
        width = min(_CANDIDATES * _BATCH, columns - len(chosen))
        candidates = score.topk(width, largest=False).indices.sort().values
        limit = torch.where(torch.zeros_like(alive).index_fill_(0, candidates, True), torch.inf, score)
        bound = limit.min()  # the cheapest of all others
        first = len(chosen)
        done_g, done_n = steps_g[:first], steps_n[:first]
        last = int(candidates[-1]) + 1  # U is zero below its diagonal
        part_g = upper[:last, candidates].T @ upper[:last]
        part_n = weight[:, candidates].T @ work
        if first:
            part_g.addmm_(done_g[:, candidates].T, done_g, alpha=-1)
            part_n.addmm_(done_n[:, candidates].T, done_g, alpha=-1).addmm_(done_g[:, candidates].T, done_n, alpha=-1)
        open_ = torch.ones(width, dtype=torch.bool, device=weight.device)
        while len(chosen) < min(count, first + _BATCH):
            own = torch.where(open_, (diag_n / diag_g)[candidates], torch.inf)
            cost, place = own.min(0)
            outside = torch.where(limit.isinf(), torch.inf, diag_n / diag_g)
            if len(chosen) > first and bool(outside.min() < cost):
                break
            index, step = int(candidates[place]), len(chosen)
            new_g, new_n = steps_g[first:step], steps_n[first:step]
            g = part_g[place] - new_g[:, index] @ new_g
            n = part_n[place] - new_n[:, index] @ new_g - new_g[:, index] @ new_n
            pivot, own_n = g[index].clone(), n[index].clone()
            g /= pivot.sqrt()
            n /= pivot.sqrt()
            a = n - g * (own_n / pivot / 2)
            diag_g = diag_g - g.square()
            diag_n = diag_n - 2 * a * g
            steps_g[step], steps_n[step] = g, a
            alive[index] = open_[place] = False
            chosen.append(index)
        del bound
    return torch.tensor(chosen, dtype=torch.int64, device=weight.device)


def without_columns(weight: Tensor, upper: Tensor, removed: Tensor) -> Removal:
    """The best weight that is zero in the ``removed`` columns: ``W - W_S inverse(G_SS) G_S:``.

    Args:
        weight: (c, b), float32 or float64.
        upper: as for :func:`cheapest_columns`.
        removed: (s,), int64, distinct; may be empty.
    """
    rows = upper[:, removed].T @ upper  # G_S:
    factor = torch.linalg.cholesky(rows[:, removed])
    half = torch.linalg.solve_triangular(factor, weight[:, removed].T, upper=False)
    multipliers = torch.linalg.solve_triangular(factor.T, half, upper=True)
    updated = torch.addmm(weight, multipliers.T, rows, alpha=-1)
    updated[:, removed] = 0
    return Removal(updated, removed, float(half.double().square().sum()))


def cheapest_groups(
    weight: Tensor, upper: Tensor, group_of: Tensor, allowed: Sequence[Sequence[int]], rounds: int
) -> tuple[list[int], float]:
    """Choose groups of columns, such as heads, greedily: in each round the cheapest of each class of groups.

    Args:
        weight, upper: as for :func:`cheapest_columns`.
        group_of: (b,), int64: the group of each column.
        allowed: classes of groups; each loses one in every round.
        rounds: at most the size of the smallest class.

    Returns:
        The groups in the order of removal, and the damped loss.
    """
    inverse = upper.T @ upper
    work = weight.clone()
    members = {group: (group_of == group).nonzero()[:, 0] for some in allowed for group in some}
    chosen: list[int] = []
    loss = 0.0
    for _ in range(rounds):
        for some in allowed:
            costs = {group: _cost(work, inverse, members[group]) for group in some if group not in chosen}
            best = min(costs, key=lambda group: (costs[group], group))
            chosen.append(best)
            loss += costs[best]
            columns = members[best]
            factor = torch.linalg.cholesky(inverse[columns][:, columns])
            step = torch.linalg.solve_triangular(factor, inverse[columns], upper=False)
            half = torch.linalg.solve_triangular(factor, work[:, columns].T, upper=False)
            work.addmm_(half.T, step, alpha=-1)
            inverse.addmm_(step.T, step, alpha=-1)
            inverse[columns, columns] = 1  # removed: nothing reads them again
            work[:, columns] = 0
    return chosen, loss


def _cost(weight: Tensor, inverse: Tensor, columns: Tensor) -> float:
    """``tr(W_S inverse(G_SS) W_S.T)``."""
    factor = torch.linalg.cholesky(inverse[columns][:, columns])
    return float(torch.linalg.solve_triangular(factor, weight[:, columns].T, upper=False).double().square().sum())
