"""The paper's unstructured algorithm as it is printed (algorithm 1), the baseline of the layer benchmarks.

Each block of columns inverts the trailing damped Hessian anew, takes the smallest scores of all remaining weights for
the global residual mask, and solves for each row its own system ``R^``, padded to the longest of a batch, by
``torch.linalg.solve``; a batch gathers its rows' own ``R`` to update them. Masks and weights are those of
``thanos.prune_weight``, up to rounding and to the order of equal scores; docs/method.md, section 2, says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.pattern import Unstructured

_CHUNK_ELEMENTS = 1 << 26  # a batch gathers the rows x removed x remaining columns of R


def prune(
    weight: Tensor, hessian: Tensor, sparsity: float, *, block_size: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Remove ``floor(sparsity c b)`` weights of one layer.

    Args:
        weight: (c, b), float32 or float64; not modified.
        hessian: (b, b), ``mean(x x.T)`` over tokens, of the same dtype.
        sparsity: the share of the weights to remove.
        block_size: columns per block, B.
        damping: added to the Hessian's diagonal, relative to its mean.

    Returns:
        The pruned weight (c, b), and its mask (c, b), bool, True where pruned.

    Raises:
        torch.linalg.LinAlgError: a trailing Hessian is singular.
    """
    damped, dead, _ = kernels.damp(hessian, damping)
    work, norms = weight.masked_fill(dead, 0), hessian.diagonal().sqrt()
    mask, remaining = torch.zeros_like(work, dtype=torch.bool), Unstructured(sparsity).count(work.numel())
    for start in range(0, work.shape[1], block_size):
        inverse = torch.linalg.inv(damped[start:, start:])
        trailing, chosen = work[:, start:], mask[:, start : start + block_size]
        scores = (trailing.abs() * norms[start:]).flatten()
        residual = torch.zeros_like(scores, dtype=torch.bool)
        residual[scores.topk(remaining, largest=False, sorted=False).indices] = True
        chosen.copy_(residual.view_as(trailing)[:, : chosen.shape[1]])
        remaining -= int(chosen.sum())
        chunk = max(1, _CHUNK_ELEMENTS // (chosen.shape[1] * trailing.shape[1]))
        for rows, removed in zip(trailing.split(chunk), chosen.split(chunk), strict=True):
            _remove(rows, removed, inverse)
    return work, mask | dead


def _remove(rows: Tensor, removed: Tensor, inverse: Tensor) -> None:
    """``w -= u R^-1 R`` for a batch of rows (n, b'), in place; ``removed`` (n, B) marks their weights u."""
    counts = removed.sum(1)
    q = removed.byte().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
    padding = torch.arange(q.shape[1], device=q.device) >= counts[:, None]
    R = inverse[q]
    system = R.gather(2, q[:, None, :].expand(-1, q.shape[1], -1))
    system.masked_fill_(padding[:, :, None] | padding[:, None, :], 0).diagonal(dim1=1, dim2=2)[padding] = 1
    u = rows.gather(1, q).masked_fill_(padding, 0)
    multipliers = torch.linalg.solve(system, u)
    rows -= (multipliers[:, None, :] @ R)[:, 0]
    rows[:, : removed.shape[1]].masked_fill_(removed, 0)
