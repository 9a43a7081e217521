"""The global residual mask: the ``count`` smallest ``abs(w) * norm`` of a c x b matrix, exactly, without sorting.

The bits of a non-negative float order as the float does, so the count-th smallest score is found digit by digit: 8
bits, the exponent, then 11 and 12 bits of the mantissa. Four kernels, five launches, and no wait for the device:

1. *Exponents*: each program counts the 256 exponents of its tiles in shared memory (``tl.histogram``: 8 ballots, some
   40 instructions for 32 scores, which the read of those scores hides) and adds them to the common counts.
2. *Mantissas*, twice: the scores that share the digits found so far, a few percent of all, are counted by atomic adds
   on 2048 and then 4096 counters, whose mantissas are all but uniform. Four copies of the counters keep the programs
   apart. Before, each program finds the digit so far from the counts of the launch before, some tens of KiB from L2:
   cheaper than one more launch in between.
3. *Ties*: where more scores equal the threshold than are to be taken, count them by row; otherwise return at once.
4. *Mask*: of the first ``width`` columns, ties to the lower flat index, and how many were taken.

Traffic: 12 bytes for each of the c x b weights (three reads) and 5 for each of the c x ``width``. An all-equal matrix
costs more than this: its scores all meet on four counters.

One configuration each: the kernels wait for memory, and a tile of 2048 elements over 4 warps gives a thread 16 loads in
flight; over 8 in the kernel of the mantissas, which at 4 spills a register or two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton.common import aligned, general, launch, multiples_of_16

_EXPONENTS = tl.constexpr(256)
_HIGH = tl.constexpr(2048)
_LOW = tl.constexpr(4096)
_COPIES = tl.constexpr(4)
_FLOATS = 256 + 4 * (2048 + 4096)  # counters
_TILES = ((8, 256), (32, 64))  # the second for narrow matrices
_PROGRAMS = 1024


@triton.jit
def score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column):
    """The bits of ``abs(w) * norm`` of a tile, 2^31 - 1 outside the matrix: after every score."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    weight = tl.load(weights + offsets, mask=inside, other=0.0)
    norm = tl.load(norms + column, mask=column < columns, other=0.0)
    bits = (tl.abs(weight) * norm[None, :]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, bits, 0x7FFFFFFF)


@triton.jit
def _digit(counters, rank, BINS: tl.constexpr, COPIES: tl.constexpr):
    """The bin that holds the rank-th smallest (1-based), the rank within it, and how many the bin holds."""
    lane = tl.arange(0, BINS)
    count = tl.zeros((BINS,), tl.int32)
    for copy in range(COPIES):
        count += tl.load(counters + copy * BINS + lane)
    below = tl.cumsum(count, 0) < rank
    found = tl.sum(below.to(tl.int32), 0)
    return found, rank - tl.sum(tl.where(below, count, 0), 0), tl.sum(tl.where(lane == found, count, 0), 0)


@triton.jit
def _rank(wanted, rows, columns):
    """``count``, clamped to what there is."""
    return tl.minimum(tl.maximum(tl.load(wanted), 0), rows * columns).to(tl.int32)


@general
def exponents(
    weights, norms, counters, rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the scores by exponent."""
    across = tl.cdiv(columns, COLUMNS)
    lane = tl.arange(0, _EXPONENTS)
    count = tl.zeros((_EXPONENTS,), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, column = tile // across * ROWS + tl.arange(0, ROWS), tile % across * COLUMNS + tl.arange(0, COLUMNS)
        bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
        count += tl.histogram(tl.reshape(bits >> 23, (ROWS * COLUMNS,)), _EXPONENTS)
    tl.atomic_add(counters + lane, count, mask=count > 0, sem="relaxed")


@general
def mantissas(
    weights, norms, counters, wanted, rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the scores of the exponent found by their next 11 bits or, those that share these too, by the last 12."""
    high = counters + _EXPONENTS
    low = high + _COPIES * _HIGH
    prefix, rank, _ = _digit(counters, _rank(wanted, rows, columns), _EXPONENTS, 1)
    if LAST:
        found, rank, _ = _digit(high, rank, _HIGH, _COPIES)
        prefix = (prefix << 11) | found
    copy = tl.program_id(0) % _COPIES
    across = tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, column = tile // across * ROWS + tl.arange(0, ROWS), tile % across * COLUMNS + tl.arange(0, COLUMNS)
        bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        if LAST:
            place = low + copy * _LOW + (bits & (_LOW - 1))
            tl.atomic_add(place, 1, mask=inside & ((bits >> 12) == prefix), sem="relaxed")
        else:
            place = high + copy * _HIGH + ((bits >> 12) & (_HIGH - 1))
            tl.atomic_add(place, 1, mask=inside & ((bits >> 23) == prefix), sem="relaxed")


@general
def ties(
    weights, norms, counters, wanted, state, tied,
    rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``state``: the threshold, how many scores equal to it to take, and whether there are more than that.

    Where there are, also count each row's scores that equal it.
    """
    high = counters + _EXPONENTS
    low = high + _COPIES * _HIGH
    exponent, rank, _ = _digit(counters, _rank(wanted, rows, columns), _EXPONENTS, 1)
    upper, rank, _ = _digit(high, rank, _HIGH, _COPIES)
    lower, rank, equal = _digit(low, rank, _LOW, _COPIES)
    threshold = (exponent << 23) | (upper << 12) | lower
    some = rank < equal
    if tl.program_id(0) == 0:
        tl.store(state, threshold)
        tl.store(state + 1, rank)
        tl.store(state + 2, some.to(tl.int32))
    for first in range(tl.program_id(0) * ROWS, tl.where(some, rows, 0), tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        count = tl.zeros((ROWS,), tl.int32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
            count += tl.sum(((bits == threshold) & (column < columns)[None, :]).to(tl.int32), 1)
        tl.store(tied + row, count, mask=row < rows)


@general
def residual_mask(
    weights, norms, state, tied, mask, taken,
    rows: tl.int32, columns: tl.int32, width: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The mask of the first ``width`` columns, and how many weights it holds added to ``taken``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    threshold, rank, some = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    lane = tl.arange(0, COLUMNS)
    earlier = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, tl.where(some > 0, tl.program_id(0) * ROWS, 0), COLUMNS):
        earlier += tl.load(tied + start + lane, mask=start + lane < tl.program_id(0) * ROWS, other=0)
    own = tl.load(tied + row, mask=(row < rows) & (row < tl.where(some > 0, rows, 0)), other=0)
    before = tl.sum(earlier, 0) + tl.cumsum(own, 0) - own
    limit = tl.where(some > 0, rank, 0x7FFFFFFF)
    count = tl.zeros((ROWS,), tl.int32)
    for start in range(0, width, COLUMNS):
        column = start + lane
        bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
        equal = (bits == threshold).to(tl.int32)
        order = before[:, None] + tl.cumsum(equal, 1) - equal
        inside = (row < rows)[:, None] & (column < width)[None, :]
        chosen = inside & ((bits < threshold) | ((equal > 0) & (order < limit)))
        place = mask + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(place, chosen.to(tl.uint8), mask=inside)
        before += tl.sum(equal, 1)
        count += tl.sum(chosen.to(tl.int32), 1)
    tl.atomic_add(taken, tl.sum(count, 0).to(tl.int64), sem="relaxed")


_GENERAL = (exponents, mantissas, ties, residual_mask)
_ALIGNED = tuple(aligned(kernel.fn, "weights", "columns", "width", "stride_row") for kernel in _GENERAL)
residual_mask_aligned = _ALIGNED[-1]


def tile_of(columns: int) -> dict[str, int]:
    """The tile that a matrix of so many columns is read in."""
    rows, across = _TILES[0] if columns > _TILES[1][1] else _TILES[1]
    return {"ROWS": rows, "COLUMNS": across}


def select_smallest(weights: Tensor, norms: Tensor, count: int | Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As ``reference.select_smallest``, for float32. ``count`` may lie on the device; nothing waits for it.

    A count beyond the c x b weights there are takes them all.
    """
    rows, columns = weights.shape
    if rows * columns >= 1 << 31:
        raise ValueError(f"select_smallest: {rows} x {columns} weights are more than 2^31; split the rows")
    device = weights.device
    if isinstance(count, Tensor):
        wanted = count.to(device, torch.int64)
    else:
        wanted = torch.full((), count, dtype=torch.int64, device=device)
    counters = torch.zeros(_FLOATS, dtype=torch.int32, device=device)
    state = torch.empty(3, dtype=torch.int32, device=device)
    tied = torch.empty(rows, dtype=torch.int32, device=device)
    mask = torch.empty(rows, width, dtype=torch.bool, device=device)
    taken = torch.zeros((), dtype=torch.int64, device=device)
    norms = norms.contiguous()
    strides = weights.stride()
    tile = tile_of(columns)
    programs = (min(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]), _PROGRAMS),)
    whole = weights.stride(1) == 1 and multiples_of_16(weights, columns, width, weights.stride(0))
    by_exponent, by_mantissa, find_ties, write = _ALIGNED if whole else _GENERAL
    launch(by_exponent, programs, weights, norms, counters, rows, columns, *strides, **tile)
    for last in (False, True):
        launch(
            by_mantissa, programs, weights, norms, counters, wanted, rows, columns, *strides,
            LAST=last, **tile, num_warps=8,
        )  # fmt: skip
    launch(
        find_ties, (min(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS),),
        weights, norms, counters, wanted, state, tied, rows, columns, *strides, **tile,
    )  # fmt: skip
    tile = tile_of(width)
    launch(
        write, (triton.cdiv(rows, tile["ROWS"]),),
        weights, norms, state, tied, mask.view(torch.uint8), taken, rows, columns, width, *strides, **tile,
    )  # fmt: skip
    return mask, taken
