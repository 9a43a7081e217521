"""Dense algebra arranged into matrix products, so that it runs at their speed on any device PyTorch knows."""

from __future__ import annotations

import torch
from torch import Tensor

from thanos_kernels import native, reference

_STRIP = 192  # columns (or rows) per product
_WIDE = 1024  # columns from which rounding to bfloat16 costs little beside the products
_ROWS_ON_CPU = 1024  # of a tall product: what it makes stays in cache


def inverse_factor(matrix: Tensor) -> Tensor:
    """As ``reference.inverse_factor``: b^3/3 flops for the factor, b^3/3 for its inverse, all of it in place.

    ``matrix = R @ R.T`` with R upper triangular is what Cholesky's factor of the reversed matrix is after reversal, so
    the strips are taken from the last to the first and nothing is reversed but the diagonal blocks.
    """
    info = _factor_upper_(matrix)
    _invert_upper_(matrix)
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
    for start, stop in _strips(half):
        corner[start:stop] = (top[start:stop, start:] @ corner[start:]).neg_()


def empty_aligned(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, columns) whose rows start at whole cache lines.

    A product that writes into rows which do not can take 1.4 times as long on a CPU.
    """
    line = 64 // like.element_size()
    return like.new_empty((rows, -(-columns // line) * line))[:, :columns]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, aligned."""
    return torch.mm(left, right, out=empty_aligned(len(left), right.shape[1], right))


def eliminate(hessian: Tensor, diagonal: Tensor, kept: Tensor, removed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.eliminate``: rows T of Cholesky's upper factor of Hd, T in front of S, then a back substitution.

    Each strip of rows is gathered from the Hessian when it is its turn. t^3/3 + 2 s t^2 + s^2 t flops.
    """
    many, few = len(kept), len(removed)
    upper = empty_aligned(many, many, hessian)  # of T; its diagonal blocks are kept inverted
    right = empty_aligned(many, few, hessian)
    info = torch.zeros((), dtype=torch.int32, device=hessian.device)
    for start, stop in _strips(many):
        block, across, rows = upper[start:stop, start:], right[start:stop], kept[start:stop]
        strip = hessian.index_select(0, rows)
        block.copy_(strip.index_select(1, kept[start:])).diagonal().copy_(diagonal[rows])
        across.copy_(strip.index_select(1, removed))
        above = upper[:start, start:stop].T
        block.addmm_(above, upper[:start, start:], alpha=-1)
        across.addmm_(above, right[:start], alpha=-1)
        inverse, failed = _inverse_of_factor(block[:, : stop - start])
        block[:, stop - start :] = _product(inverse, block[:, stop - start :])
        block[:, : stop - start] = inverse.T
        across.copy_(_product(inverse, across))
        info = torch.maximum(info, failed)
    schur = empty_aligned(few, few, hessian)
    for start, stop in _strips(few):
        block, rows = schur[start:stop, start:], removed[start:stop]
        block.copy_(hessian.index_select(0, rows).index_select(1, removed[start:])).diagonal().copy_(diagonal[rows])
        block.addmm_(right[:, start:stop].T, right[:, start:], alpha=-1)
        schur[stop:, start:stop] = block[:, stop - start :].T
    for start, stop in reversed(_strips(many)):
        row = right[start:stop].addmm_(upper[start:stop, stop:], right[stop:], alpha=-1)
        row.copy_(_product(upper[start:stop, start:stop], row))
    return right, schur, info


def _strips(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _STRIP, size)) for start in range(0, size, _STRIP)]


def row_energy(weights: Tensor, hessian: Tensor) -> Tensor:
    """As ``reference.row_energy`` at little more than half its flops, reading one triangle of the Hessian.

    ``w H w.T = sum over strips s of w_s . (w_s H[s, s] + 2 w_after H[after, s])``.
    """
    sums = torch.promote_types(weights.dtype, torch.float32)
    energy = weights.new_zeros(len(weights), dtype=sums)
    rows = _ROWS_ON_CPU if weights.device.type == "cpu" else max(1, len(weights))
    for part, total in zip(weights.split(rows), energy.split(rows), strict=True):
        for start, stop in _strips(weights.shape[1]):
            product = part[:, start:stop] @ hessian[start:stop, start:stop]
            product.addmm_(part[:, stop:], hessian[stop:, start:stop], alpha=2)
            total += torch.linalg.vecdot(product.to(sums), part[:, start:stop].to(sums))
    return energy


def outlier_rows(weights: Tensor, hessian: Tensor, count: int) -> Tensor:
    """As ``reference.outlier_rows``; where bfloat16 pays, by exact energies of the rows it leaves in doubt alone.

    Rounding errors are below 2^-9 of what is rounded. Taken as independent they give a row's energy h a standard
    deviation of about ``2^-9 (h + d)``, d = sum_j w_j^2 H_jj, since ``|H_jk| <= sqrt(H_jj H_kk)`` and
    ``|(H w)_j| <= sqrt(H_jj h)``. A row is in doubt within ``2^-5 (h + d)``, sixteen times that.
    """
    if not 0 < count < len(weights) or not bfloat16_pays(weights):
        return reference.largest(row_energy(weights, hessian), count)
    energy = row_energy(weights.bfloat16(), hessian.bfloat16())
    margin = (energy + weights.square() @ hessian.diagonal()) * 2**-5
    low, high = energy - margin, energy + margin
    outlier = low > high.topk(count + 1).values[-1]
    doubtful = (~outlier & ~(high < low.topk(count).values[-1])).nonzero().flatten()
    missing = count - int(outlier.sum())
    outlier[doubtful] = reference.largest(row_energy(weights[doubtful], hessian), missing)
    return outlier


def bfloat16_pays(weights: Tensor) -> bool:
    """Whether products of these weights (c, b) are much faster in bfloat16 than in their own dtype."""
    return weights.shape[1] >= _WIDE and multiplies_bfloat16(weights)


def multiplies_bfloat16(like: Tensor) -> bool:
    """Whether what is computed in float32 like ``like`` could be had from units for products of bfloat16."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and native.multiplies_bfloat16()
