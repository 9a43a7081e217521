"""Brute force in float64, straight from the definitions: every trailing inverse recomputed, every row solved alone.

Nothing here is shared with the engine, so agreement means something.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer(rows: int, columns: int, seed: int, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A random weight (c, b) and a Hessian (b, b) of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs / len(inputs)


def damped(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    live = diagonal != 0
    mean = diagonal[live].mean() if live.any() else torch.tensor(1.0, dtype=hessian.dtype)
    return hessian + torch.diag(torch.where(live, 0, mean)) + damping * mean * torch.eye(len(hessian)).to(hessian)


def layer_loss(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    change = (after - before).double()
    return float(torch.trace(change @ hessian.double() @ change.T))


def smallest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def thanos_blocks(
    weight: Tensor,
    hessian: Tensor,
    *,
    count: int | None = None,
    n_of_m: tuple[int, int] | None = None,
    block: int,
    damping: float = 0.01,
    metric: str = "wanda",
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 (``count`` weights of the layer) or its n:m form, with a choice of mask metric; weight and mask."""
    w, (rows, columns) = weight.clone(), weight.shape
    mask = torch.zeros_like(w, dtype=torch.bool)
    norms = hessian.diagonal().sqrt()
    full, budget = damped(hessian, damping), count or 0
    w[:, norms == 0] = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        trailing = columns - start
        inverse = torch.linalg.inv(full[start:, start:])
        scale = {"wanda": norms[start:], "obs": inverse.diagonal().rsqrt(), "magnitude": torch.ones(trailing)}[metric]
        scores = w[:, start:].abs() * scale
        if n_of_m is None:
            chosen = smallest(scores.flatten().tolist(), budget)
            here = {(k // trailing, start + k % trailing) for k in chosen if k % trailing < stop - start}
        else:
            n, m = n_of_m
            here = {
                (i, g + k)
                for i in range(rows)
                for g in range(start, stop, m)
                for k in smallest(scores[i, g - start : g - start + m].tolist(), n)
            }
        budget -= len(here)
        for i in range(rows):
            q = sorted(j - start for r, j in here if r == i)
            if q:
                multipliers = torch.linalg.solve(inverse[q][:, q], w[i, [start + j for j in q]])
                w[i, start:] -= multipliers @ inverse[q]
        for i, j in here:
            mask[i, j], w[i, j] = True, 0
    mask[:, norms == 0] = True
    return w, mask


def sparsegpt_blocks(weight: Tensor, hessian: Tensor, *, sparsity: float, block: int) -> tuple[Tensor, Tensor]:
    """SparseGPT, unstructured: one weight at a time by the optimal brain surgeon's update; weight and mask."""
    w, (rows, columns) = weight.clone(), weight.shape
    mask = torch.zeros_like(w, dtype=torch.bool)
    full = damped(hessian, 0.01)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        # 1 / U_jj^2 is the diagonal of the inverse of the Hessian of the columns from j on, inverted
        first = [float(torch.linalg.inv(full[j:, j:])[0, 0]) for j in range(start, stop)]
        scores = w[:, start:stop].square() / torch.tensor(first).to(w)
        count = math.floor(sparsity * rows * (stop - start) + 1e-9)
        width = stop - start
        for k in smallest(scores.flatten().tolist(), count):
            mask[k // width, start + k % width] = True
        for j in range(start, stop):
            inverse = torch.linalg.inv(full[j:, j:])
            error = torch.where(mask[:, j], w[:, j] / inverse[0, 0], 0)
            w[:, j:] -= error[:, None] * inverse[0]
            w[mask[:, j], j] = 0
    return w, mask


def least_squares(weight: Tensor, hessian: Tensor, mask: Tensor, damping: float = 0.01) -> Tensor:
    """The best weight with zeros at the mask: each row's kept weights solved for exactly."""
    full, best = damped(hessian, damping), torch.zeros_like(weight)
    for i in range(len(weight)):
        kept = (~mask[i]).nonzero()[:, 0]
        best[i, kept] = torch.linalg.solve(full[kept][:, kept], full[kept] @ weight[i])
    return best


def admm(
    weight: Tensor,
    start: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    n_of_m: tuple[int, int] | None,
    rho: float,
    stages: int,
    rounds: int,
    growth: tuple[float, float, float],
    damping: float = 0.01,
) -> Tensor:
    """The mask after ``stages`` of ADMM with B, Z and u as the textbook has them; None: the layer keeps its count."""
    full = damped(hessian, damping)
    n = full.diagonal().sqrt()
    a, b0, z, (rows, columns) = full / n / n[:, None], weight * n, start * n, weight.shape
    u, kept, count = torch.zeros_like(z), int((~mask).sum()), int(mask.sum())
    for _ in range(stages):
        before = mask
        for _ in range(rounds):
            b = torch.linalg.solve(a + rho * torch.eye(columns).to(a), (b0 @ a + rho * (z - u)).T).T
            scores = (b + u).abs()
            mask = torch.zeros_like(mask)
            if n_of_m is None:
                for k in smallest(scores.flatten().tolist(), count):
                    mask[k // columns, k % columns] = True
            else:
                for i in range(rows):
                    for g in range(0, columns, n_of_m[1]):
                        mask[i, [g + k for k in smallest(scores[i, g : g + n_of_m[1]].tolist(), n_of_m[0])]] = True
            z = (b + u).masked_fill(mask, 0)
            u = u + b - z
        share = int((before & ~mask).sum()) / kept
        if share == 0:
            break
        factor = growth[0] if share > 0.1 else growth[1] if share > 0.005 else growth[2]
        rho, u = rho * factor, u / factor
    return mask
