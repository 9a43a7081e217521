"""The whole algorithm on one screen, in float64 and straight from the definitions: read this first.

Every method walks over the columns in blocks. In each it *selects* weights, *compensates* for them with the inverse of
the Hessian of the columns that are still free, and *updates* those columns (docs/method.md, section 3). The engine does
the same with one factor for all blocks and all rows at once, and is tested against this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured


def prune(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    method: str = "thanos",
    B: int = 128,
    alpha: float = 0.0,
    damping: float = 0.01,
    metric: str = "wanda",
) -> tuple[Tensor, Tensor]:
    """The pruned weight (c, b), float64, and its mask, bool, of W (c, b) and H (b, b), mean(x x.T) over tokens."""
    W, H, mask = W.double().clone(), H.double(), torch.zeros(W.shape, dtype=torch.bool, device=W.device)
    dead, norms = H.diagonal() == 0, H.diagonal().sqrt()
    mean = H.diagonal()[~dead].mean() if not dead.all() else H.new_ones(())
    Hd = H + torch.diag(torch.where(dead, mean, 0.0) + damping * mean)  # damped: docs/method.md, section 1
    energy = ((W @ H) * W).sum(1)  # rows with the largest are outliers, left untouched
    rows = energy.argsort(descending=True, stable=True)[math.ceil(alpha * len(W)) :].sort().values
    w, m = W[rows], mask[rows]
    w[:, dead] = 0

    joint = isinstance(pattern, Structured) and method == "thanos"  # whole columns: all of them in one block
    width = w.shape[1] if joint or method in ("wanda", "magnitude") else B
    budget = pattern.count(w.numel()) if isinstance(pattern, Unstructured) else 0
    removed = _columns(w, Hd, norms, pattern, method, alpha, metric) if isinstance(pattern, Structured) else None
    for j in range(0, w.shape[1], width):
        e = min(j + width, w.shape[1])
        if method == "sparsegpt":
            _one_column_at_a_time(w, m, Hd, j, e, pattern, removed)
            continue
        G = torch.linalg.inv(Hd[j:, j:])  # of the columns that are still free
        scores = w[:, j:].abs() * _scale(method, metric, norms[j:], G)  # 1. select
        if removed is not None:
            m[:, j:e] = removed[j:e]
        elif isinstance(pattern, SemiStructured):
            for g in range(0, e - j, pattern.m):
                m[:, j + g : j + g + pattern.m] = _smallest_in_rows(scores[:, g : g + pattern.m], pattern.n)
        elif method == "wanda" and isinstance(pattern, Unstructured):
            m[:] = _smallest_in_rows(scores, pattern.count(w.shape[1]))
        else:
            m[:, j:e] = _smallest(scores, budget)[:, : e - j]  # of all remaining columns; this block takes its part
            budget -= int(m[:, j:e].sum())
        for i in range(len(w)) if method == "thanos" else ():
            q = m[i, j:e].nonzero()[:, 0]  # 2. compensate: u inverse(R), R = G[q, q]
            w[i, j:] -= torch.linalg.solve(G[q][:, q], w[i, j + q]) @ G[q]  # 3. update
    w[m] = 0
    m |= dead
    W[rows], mask[rows] = w, m
    return W, mask


def _one_column_at_a_time(
    w: Tensor, m: Tensor, Hd: Tensor, j: int, e: int, pattern: Pattern, removed: Tensor | None
) -> None:
    """SparseGPT's block: a share of it by ``(w / U_kk)^2``, or n of each group when its first column is reached."""
    pivots = _pivots(Hd)
    if removed is not None:
        m[:, j:e] = removed[j:e]
    elif isinstance(pattern, Unstructured):
        scores = w[:, j:e].abs() / pivots[j:e]
        m[:, j:e] = _smallest(scores, pattern.count(scores.numel()))
    for k in range(j, e):
        if isinstance(pattern, SemiStructured) and k % pattern.m == 0:
            g = slice(k, k + pattern.m)
            m[:, g] = _smallest_in_rows(w[:, g].abs() / pivots[g], pattern.n)
        G = torch.linalg.inv(Hd[k:, k:])
        w[:, k:] -= torch.where(m[:, k], w[:, k] / G[0, 0], 0.0)[:, None] * G[0]


def _pivots(Hd: Tensor) -> Tensor:
    """``U_kk`` of every column: the root of the first entry of its trailing inverse."""
    return torch.stack([torch.linalg.inv(Hd[k:, k:])[0, 0] for k in range(len(Hd))]).sqrt()


def _scale(method: str, metric: str, norms: Tensor, G: Tensor) -> Tensor:
    if method == "magnitude" or (method == "thanos" and metric == "magnitude"):
        return torch.ones_like(norms)
    return G.diagonal().rsqrt() if method == "thanos" and metric == "obs" else norms


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` smallest, ties to the lower index."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = True
    return mask.view_as(scores)


def _smallest_in_rows(scores: Tensor, count: int) -> Tensor:
    return torch.stack([_smallest(row, count) for row in scores])


def _columns(
    w: Tensor, Hd: Tensor, norms: Tensor, pattern: Structured, method: str, alpha: float, metric: str
) -> Tensor:
    """Mask (b,) of the columns to remove."""
    if method == "sparsegpt":
        scores = w.square().sum(0) / _pivots(Hd).square()
    elif method == "thanos":
        scores = w.square().sum(0) * _scale(method, metric, norms, torch.linalg.inv(Hd)).square()
    else:
        scores = w.abs().sum(0) * _scale(method, metric, norms, Hd)
    return _smallest(scores, pattern.columns(len(scores), alpha))
