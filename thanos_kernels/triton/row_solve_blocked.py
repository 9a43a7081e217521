"""Row solve for more than 128 columns: a blocked left-looking Cholesky factorisation, one row's system a program.

For each tile column k of the s x s system, with T x T tiles (T = 32):

    A_kk - sum_j L_kj L_kj.T = L_kk L_kk.T          eliminated in registers, giving inverse(L_kk)
    L_ik = (A_ik - sum_j L_ij L_kj.T) inverse(L_kk).T   for the tiles below: products alone, on the matrix units
    y_k  = inverse(L_kk) (w_k - sum_j L_kj y_j)

and then backwards ``x_k = inverse(L_kk).T (y_k - sum_i L_ik.T x_i)``. ``gram`` is gathered on the fly; the diagonal
tiles keep their inverses. Cost a system: s^3 / 6 + s^2 T / 2 multiply-adds on the matrix units, 2 s T^2 on the ordinary
ones, and 4 s^3 / (3 T) bytes from L2 and L1.

L lies in the program's own slot of the workspace, tile by tile, lower triangle only: 4 T^2 bytes each, 0.55 MiB for
512 columns and 8.1 MiB for 2048. There are as many programs as slots fit the limit, so it also bounds the parallelism.

Configurations: T = 32 because an eliminated tile costs T dependent steps whatever its size, and 2 s T^2 multiply-adds
a system, which at T = 64 would outweigh the products for s = 256; at T = 16 the matrix units would starve. 4 or 8
warps: 2 spill registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton import common
from thanos_kernels.triton.common import aligned, general, tuned

TILE = 32
_PROGRAMS = 1024
_CONFIGS = [
    triton.Config({}, num_warps=4, num_stages=1),
    triton.Config({}, num_warps=8, num_stages=1),
]


@triton.jit
def gather(gram, width, first, second, count, q1, q2):
    """The part of ``gram[q, q]`` at positions ``first`` x ``second``; the identity beyond ``count``."""
    inside = (first < count)[:, None] & (second < count)[None, :]
    values = tl.load(gram + q1[:, None] * width + q2[None, :], mask=inside, other=0.0)
    return values + ((first[:, None] == second[None, :]) & (first >= count)[:, None]).to(tl.float32)


@triton.jit
def _tile(i, j, T: tl.constexpr):
    """Where tile (i, j), j <= i, begins in a slot."""
    return (i * (i + 1) // 2 + j) * T * T


@triton.jit
def _inverse_factor(a, steps, T: tl.constexpr):
    """inverse(L) for ``a = L @ L.T``, by elimination of ``[a | I]``; also where the first bad pivot stood, 1-based."""
    lane = tl.arange(0, T)
    inverse = (lane[:, None] == lane[None, :]).to(tl.float32)
    pivots = tl.full((T,), 1.0, tl.float32)
    failed = 0
    for j in range(steps):
        here = lane == j
        row = tl.sum(tl.where(here[:, None], a, 0.0), 0)
        row_inverse = tl.sum(tl.where(here[:, None], inverse, 0.0), 0)
        pivot = tl.sum(tl.where(here, row, 0.0), 0)
        good = pivot > 0
        failed = tl.where(good | (failed > 0), failed, j + 1)
        pivot = tl.where(good, pivot, 1.0)
        factor = tl.where(lane > j, -row / pivot, 0.0)  # the rest of a stays symmetric
        a = tl.fma(factor[:, None], row[None, :], a)
        inverse = tl.fma(factor[:, None], row_inverse[None, :], inverse)
        pivots = tl.where(here, pivot, pivots)
    return inverse / tl.sqrt_rn(pivots)[:, None], failed


@general
def blocked(
    gram, weights, out, index, counts, order, filled, info, scratch,
    bucket: tl.int32, rows: tl.int32, width: tl.int32, stride_row: tl.int64, stride_column,
    slot_size: tl.int64, vector: tl.int32,
    T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Solve the systems of one bucket, each program in its slot: ``vector`` is where y and then x lie in it."""
    slot = scratch + tl.program_id(0).to(tl.int64) * slot_size
    y = slot + vector
    lane = tl.arange(0, T)
    within = lane[:, None] * T + lane[None, :]
    for item in range(tl.program_id(0), tl.load(filled + bucket), tl.num_programs(0)):
        row = tl.load(order + bucket.to(tl.int64) * rows + item).to(tl.int64)
        count = tl.load(counts + row)
        columns = index + row * width
        tiles = tl.cdiv(count, T)
        failed = 0
        for k in range(tiles):
            here = k * T + lane
            q = tl.load(columns + here, mask=here < count, other=0).to(tl.int32)
            a = gather(gram, width, here, here, count, q, q)
            w = tl.load(weights + row * stride_row + q.to(tl.int64) * stride_column, mask=here < count, other=0.0)
            for j in range(k):
                left = tl.load(slot + _tile(k, j, T) + within)
                w -= tl.sum(left * tl.load(y + j * T + lane)[None, :], 1)
                a -= tl.dot(left, tl.trans(left), input_precision=PRECISION)
            inverse, bad = _inverse_factor(a, tl.minimum(count - k * T, T), T)
            failed = tl.where((failed == 0) & (bad > 0), k * T + bad, failed)
            tl.store(slot + _tile(k, k, T) + within, inverse)
            tl.store(y + here, tl.sum(inverse * w[None, :], 1))
            for i in range(k + 1, tiles):
                below = i * T + lane
                q_below = tl.load(columns + below, mask=below < count, other=0).to(tl.int32)
                a = gather(gram, width, below, here, count, q_below, q)
                for j in range(k):
                    left = tl.load(slot + _tile(i, j, T) + within)
                    right = tl.load(slot + _tile(k, j, T) + within)
                    a -= tl.dot(left, tl.trans(right), input_precision=PRECISION)
                a = tl.dot(a, tl.trans(inverse), input_precision=PRECISION)
                tl.store(slot + _tile(i, k, T) + within, a)
            tl.debug_barrier()  # the next tile column reads what other threads have stored
        kept = tl.where(failed == 0, count, 0)
        for back in range(tiles):
            k = tiles - 1 - back
            right_side = tl.load(y + k * T + lane)
            for i in range(k + 1, tiles):
                left = tl.load(slot + _tile(i, k, T) + within)
                right_side -= tl.sum(left * tl.load(y + i * T + lane)[:, None], 0)
            inverse = tl.load(slot + _tile(k, k, T) + within)
            x = tl.sum(inverse * right_side[:, None], 0)
            here = k * T + lane
            tl.debug_barrier()
            tl.store(y + here, x)
            q = tl.load(columns + here, mask=here < count, other=0).to(tl.int32)
            tl.store(out + row * width + q, x, mask=here < kept)
            tl.debug_barrier()
        bad_column = tl.load(columns + failed - 1, mask=failed > 0, other=-1).to(tl.int32)
        tl.store(info + row, bad_column + 1)


_tuned = tuned(_CONFIGS, key=["width"])(aligned(blocked.fn, "scratch", "slot_size", "vector"))  # which always are


def slot_floats(width: int) -> tuple[int, int]:
    """Floats of one slot, and where its vector begins."""
    tiles = triton.cdiv(width, TILE)
    vector = tiles * (tiles + 1) // 2 * TILE * TILE
    return vector + tiles * TILE, vector


def scratch(width: int, rows: int, limit: int, device: torch.device) -> Tensor:
    """Slots for as many systems as ``limit`` bytes hold; at least one."""
    floats, _ = slot_floats(width)
    slots = max(1, min(rows, _PROGRAMS, limit // (4 * floats)))
    return torch.empty(slots, floats, dtype=torch.float32, device=device)


def launch(
    gram: Tensor, weights: Tensor, out: Tensor, index: Tensor, counts: Tensor, order: Tensor, filled: Tensor,
    info: Tensor, bucket: int, slots: Tensor, products: str,
) -> None:  # fmt: skip
    """Solve the rows listed in ``bucket``; the lists are those of ``row_solve.plan``."""
    rows, width = weights.shape
    arguments: list[Any] = [gram, weights, out, index, counts, order, filled, info, slots, bucket, rows, width]
    common.launch(
        _tuned, (len(slots),), *arguments, weights.stride(0), weights.stride(1), slots.stride(0), slot_floats(width)[1],
        T=TILE, PRECISION=products,
    )  # fmt: skip
