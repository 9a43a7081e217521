"""Each operation in plain PyTorch: the specification that every other backend is tested against.

Short rather than fast, and usable in float64. Arguments are checked by ``ops.py``, not here. Section numbers and
formulas are those of docs/method.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24  # padded systems are c x B x B; solve them this many elements at a time


def row_solve(gram: Tensor, weights: Tensor, mask: Tensor, out: Tensor, info: Tensor) -> None:
    """Row by row, ``gram[q, q] @ out[q] = weights[q]`` with q the row's masked columns; zero off the mask."""
    rows, width = weights.shape
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, width * width))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        both = mask[part, :, None] & mask[part, None, :]
        factor, failed = torch.linalg.cholesky_ex(torch.where(both, gram, identity))
        right = torch.where(mask[part], weights[part], 0)
        solution = torch.cholesky_solve(right[..., None], factor)[..., 0]
        info[part] = failed
        out[part] = torch.where((failed == 0)[:, None], solution, 0)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` smallest of a flat tensor, ties to the lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    below, ties = scores < threshold, scores == threshold
    return below | (ties & (ties.cumsum(0) <= count - below.sum()))


def select_smallest(weights: Tensor, norms: Tensor, count: int | Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest ``abs(weights) * norms`` of the whole matrix, restricted to its first columns."""
    scores = weights.abs() * norms
    mask = _smallest(scores.flatten(), int(count)).view_as(scores)[:, :width].contiguous()
    return mask, mask.sum()


def _bits(scores: Tensor) -> Tensor:
    """The bits of non-negative floats, which order as the floats do, as int64."""
    return scores.view(torch.int32 if scores.dtype == torch.float32 else torch.int64).long()


def count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, shift: int, bits: int) -> Tensor:
    """How many scores that begin with ``prefix`` have each value of the digit behind it."""
    scores = _bits((weights.abs() * norms).flatten())
    inside = scores[scores >> (shift + bits) == prefix]
    return (inside >> shift & ((1 << bits) - 1)).bincount(minlength=1 << bits)


def select_below(weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The scores whose bits are below ``threshold`` and the first ``ties`` equal to it, of the first columns."""
    scores = _bits(weights.abs() * norms)
    equal = scores == threshold
    earlier = equal.flatten().cumsum(0).view_as(equal)
    mask = ((scores < threshold) | (equal & (earlier <= ties)))[:, :width].contiguous()
    return mask, mask.sum()


def select_per_row(weights: Tensor, norms: Tensor, count: int) -> Tensor:
    """In each row, the ``count`` smallest ``abs(weights) * norms``, ties to the lower index."""
    order = (weights.abs() * norms).argsort(dim=1, stable=True)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(1, order[:, :count], True)


def select_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """In each group of m consecutive columns, the n smallest scores, ties to the lower index."""
    groups = scores.unflatten(1, (-1, m))
    order = groups.argsort(dim=2, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order[..., :n], True).flatten(1)


def column_sweep(factor: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """SparseGPT's compensation inside a block: ``factor[q, q].T @ e[q] = weights[q]``, one column at a time."""
    work, errors = weights.clone(), torch.zeros_like(weights)
    for j in range(weights.shape[1]):
        errors[:, j] = torch.where(mask[:, j], work[:, j] / factor[j, j], 0)
        work[:, j:] -= errors[:, j, None] * factor[j, j:]
    return errors


def column_sweep_n_of_m(factor: Tensor, weights: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The same, the mask of each group of m chosen by ``(w / diag)**2`` when the sweep reaches the group."""
    work, errors = weights.clone(), torch.zeros_like(weights)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    for j in range(weights.shape[1]):
        if j % m == 0:
            group = slice(j, j + m)
            mask[:, group] = select_n_of_m(work[:, group].abs() / factor.diagonal()[group], n, m)
        errors[:, j] = torch.where(mask[:, j], work[:, j] / factor[j, j], 0)
        work[:, j:] -= errors[:, j, None] * factor[j, j:]
    return errors, mask


def accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float) -> None:
    """``hessian = (1 - weight) * hessian + weight * mean(x x.T)`` in place; ``weight = 1`` ignores what it held."""
    inputs = inputs.to(hessian.dtype)
    hessian.addmm_(inputs.T, inputs, beta=1 - weight, alpha=weight / len(inputs))


def inverse_factor(matrix: Tensor) -> Tensor:
    """Replace a matrix A by the upper triangular U with ``inverse(A) = U.T @ U``: one Cholesky factor of A reversed.

    With J the reversal: ``chol(J A J) = L`` and ``U = J inverse(L) J``. Returns the 0-d ``info`` of the factorisation,
    zero where A is positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
    return info


def eliminate(hessian: Tensor, diagonal: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``Hd[T,T]^-1 Hd[T,S]`` and the Schur complement ``Hd[S,S] - Hd[S,T] Hd[T,T]^-1 Hd[T,S]`` of kept T and removed S.

    Hd is ``hessian`` with another ``diagonal`` (b,). Returns also the 0-d ``info`` of the factorisation of ``Hd[T,T]``.
    """
    damped = hessian.clone()
    damped.diagonal().copy_(diagonal)
    across = damped[kept][:, removed]
    lower, info = torch.linalg.cholesky_ex(damped[kept][:, kept])
    solution = torch.cholesky_solve(across, lower)
    return solution, damped[removed][:, removed] - across.T @ solution, info


def row_energy(weights: Tensor, hessian: Tensor) -> Tensor:
    """``diag(weights @ hessian @ weights.T)``: each row's mean squared output per token."""
    return ((weights @ hessian) * weights).sum(1)


def outlier_rows(weights: Tensor, hessian: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` rows with the largest energy."""
    return largest(row_energy(weights, hessian), count)


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of ``values`` (c,), ties to the lower index."""
    order = values.argsort(stable=True, descending=True)
    return torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:count], True)
