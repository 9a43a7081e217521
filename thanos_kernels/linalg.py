"""Dense algebra arranged into matrix products, so that it runs at their speed on any device PyTorch knows."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 256  # columns (or rows) per product


def inverse_factor(damped: Tensor, out: Tensor) -> Tensor:
    """As ``reference.inverse_factor``, in place in ``out``: b^3/3 flops for the factor, b^3/3 for its inverse.

    ``damped = R @ R.T`` with R upper triangular is what Cholesky's factor of the reversed matrix is after reversal, so
    the strips are taken from the last to the first and nothing is reversed but the diagonal blocks.
    """
    out.copy_(damped)
    info = _factor_upper_(out)
    _invert_upper_(out)
    return info


def _factor_upper_(matrix: Tensor) -> Tensor:
    """Replace a symmetric matrix by R, its diagonal blocks by their inverses already; the rest below is zeroed."""
    size = len(matrix)
    info = torch.zeros((), dtype=torch.int32, device=matrix.device)
    for stop in range(size, 0, -_STRIP):
        start = max(0, stop - _STRIP)
        panel = matrix[:stop, start:stop]
        if stop < size:
            panel.addmm_(matrix[:stop, stop:], matrix[start:stop, stop:].T, alpha=-1)
        inverse, failed = _inverse_of_factor(panel[start:].flip(0, 1))
        inverse = inverse.flip(0, 1)
        panel[:start].copy_(panel[:start] @ inverse.T)
        panel[start:].copy_(inverse)
        matrix[start:stop, :start].zero_()
        info = torch.maximum(info, failed)
    return info


def _inverse_of_factor(block: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of Cholesky's lower factor of a small matrix, and the 0-d ``info`` of the factorisation."""
    lower, failed = torch.linalg.cholesky_ex(block)
    identity = torch.eye(len(block), dtype=block.dtype, device=block.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False), failed


def _invert_upper_(upper: Tensor) -> None:
    """Replace R by its inverse, the diagonal blocks being inverted: ``[[A, B], [0, C]] -> [[A', -A' B C'], [0, C']]``.

    Both products with a triangle go strip by strip past its zeros, in place.
    """
    size = len(upper)
    if size <= _STRIP:
        return
    # Strips were counted from the end, so the cut leaves whole strips below it.
    half = size - (size // 2 + _STRIP - 1) // _STRIP * _STRIP
    top, corner, bottom = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_upper_(top)
    _invert_upper_(bottom)
    for stop in range(size - half, 0, -_STRIP):
        strip = slice(max(0, stop - _STRIP), stop)
        corner[:, strip] = corner[:, :stop] @ bottom[:stop, strip]
    for start in range(0, half, _STRIP):
        strip = slice(start, min(start + _STRIP, half))
        corner[strip] = (top[strip, start:] @ corner[start:]).neg_()


def eliminate(hessian: Tensor, diagonal: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.eliminate``: rows T of Cholesky's upper factor of Hd, T in front of S, then a back substitution.

    Each strip of rows is gathered from the Hessian when it is its turn. t^3/3 + 2 s t^2 + s^2 t flops.
    """
    order, many = torch.cat([kept, removed]), len(kept)
    upper = hessian.new_empty((many, len(order)))
    info = torch.zeros((), dtype=torch.int32, device=hessian.device)
    for start, stop in _strips(0, many):
        panel, width = upper[start:stop, start:], stop - start
        _gather(hessian, diagonal, order, start, stop, panel)
        panel.addmm_(upper[:start, start:stop].T, upper[:start, start:], alpha=-1)
        inverse, failed = _inverse_of_factor(panel[:, :width])
        panel[:, width:] = inverse @ panel[:, width:]
        panel[:, :width] = inverse.T  # diagonal blocks are kept inverted
        info = torch.maximum(info, failed)
    right = upper[:, many:]
    schur = hessian.new_empty((len(removed), len(removed)))
    for start, stop in _strips(many, len(order)):
        low, high = start - many, stop - many
        panel = schur[low:high, low:]
        _gather(hessian, diagonal, order, start, stop, panel)
        panel.addmm_(right[:, low:high].T, right[:, low:], alpha=-1)
        schur[high:, low:high] = panel[:, stop - start :].T
    for start, stop in reversed(_strips(0, many)):
        row = right[start:stop].addmm_(upper[start:stop, stop:many], right[stop:], alpha=-1)
        row.copy_(upper[start:stop, start:stop] @ row)
    return right, schur, info


def _strips(start: int, stop: int) -> list[tuple[int, int]]:
    return [(first, min(first + _STRIP, stop)) for first in range(start, stop, _STRIP)]


def _gather(hessian: Tensor, diagonal: Tensor, order: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Rows start to stop and columns from start on of the reordered Hessian, with another diagonal."""
    rows = order[start:stop]
    out.copy_(hessian.index_select(0, rows).index_select(1, order[start:]))
    out.diagonal().copy_(diagonal[rows])


def row_energy(weights: Tensor, hessian: Tensor) -> Tensor:
    """As ``reference.row_energy`` at little more than half its flops, reading one triangle of the Hessian.

    ``w H w.T = sum over strips s of w_s . (w_s H[s, s] + 2 w_after H[after, s])``.
    """
    energy = weights.new_zeros(len(weights))
    for start in range(0, weights.shape[1], _STRIP):
        strip = slice(start, min(start + _STRIP, weights.shape[1]))
        product = weights[:, strip] @ hessian[strip, strip]
        product.addmm_(weights[:, strip.stop :], hessian[strip.stop :, strip], alpha=2)
        energy += torch.linalg.vecdot(product, weights[:, strip])
    return energy
