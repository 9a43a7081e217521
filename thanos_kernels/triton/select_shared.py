"""The global residual mask of a matrix whose rows are shared out: counts that add up, and the mask by a threshold.

What ``select.py`` does in five launches without a word to anybody is done here in steps, so that the counts of several
devices can be added between them. The reads are the same; each step is one launch more, or two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton.common import aligned, general, launch, multiples_of_16
from thanos_kernels.triton.select import residual_mask, residual_mask_aligned, score_bits, tile_of

_PROGRAMS = 1024
_COPIES = 4  # of the counters, which keep programs apart


@general
def digits(
    weights, norms, prefix, counts, rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    SHIFT: tl.constexpr, BITS: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count the scores that begin with ``prefix`` by their next digit, by atomic adds.

    The first digit is the exponent and 8 bits of the mantissa: 256 counters share the scores of one exponent.
    """
    across = tl.cdiv(columns, COLUMNS)
    wanted = tl.load(prefix).to(tl.int32)
    own = counts + tl.program_id(0) % COPIES * (1 << BITS)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row, column = tile // across * ROWS + tl.arange(0, ROWS), tile % across * COLUMNS + tl.arange(0, COLUMNS)
        bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
        chosen = (row < rows)[:, None] & (column < columns)[None, :]
        if SHIFT + BITS < 31:
            chosen = chosen & ((bits >> (SHIFT + BITS)) == wanted)
        place = own + ((bits >> SHIFT) & ((1 << BITS) - 1))
        tl.atomic_add(place, 1, mask=chosen, sem="relaxed")


@general
def equals(
    weights, norms, threshold, ties, state, tied,
    rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count each row's scores that equal the threshold, and write the ``state`` that ``select.residual_mask`` reads."""
    bound = tl.load(threshold).to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(state, bound)
        tl.store(state + 1, tl.minimum(tl.load(ties), 0x7FFFFFFF).to(tl.int32))
        tl.store(state + 2, 1)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        count = tl.zeros((ROWS,), tl.int32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
            count += tl.sum(((bits == bound) & (column < columns)[None, :]).to(tl.int32), 1)
        tl.store(tied + row, count, mask=row < rows)


_GENERAL = (digits, equals, residual_mask)
_ALIGNED = (
    aligned(digits.fn, "weights", "columns", "stride_row"),
    aligned(equals.fn, "weights", "columns", "stride_row"),
    residual_mask_aligned,
)


def _refuse_too_many(operation: str, weights: Tensor) -> None:
    if weights.numel() >= 1 << 31:
        rows, columns = weights.shape
        raise ValueError(f"{operation}: {rows} x {columns} weights are more than 2^31; split the rows")


def count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, shift: int, bits: int) -> Tensor:
    """As ``reference.count_scores``, for float32."""
    _refuse_too_many("count_scores", weights)
    rows, columns = weights.shape
    counts = torch.zeros(_COPIES, 1 << bits, dtype=torch.int32, device=weights.device)
    tile = tile_of(columns)
    programs = (min(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["COLUMNS"]), _PROGRAMS),)
    whole = weights.stride(1) == 1 and multiples_of_16(weights, columns, weights.stride(0))
    launch(
        (_ALIGNED if whole else _GENERAL)[0], programs,
        weights, norms.contiguous(), prefix.to(weights.device, torch.int64), counts, rows, columns, *weights.stride(),
        SHIFT=shift, BITS=bits, COPIES=_COPIES, **tile, num_warps=8,
    )  # fmt: skip
    return counts.sum(0, dtype=torch.int64)


def select_below(weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As ``reference.select_below``, for float32."""
    _refuse_too_many("select_below", weights)
    rows, columns = weights.shape
    device = weights.device
    state = torch.empty(3, dtype=torch.int32, device=device)
    tied = torch.empty(rows, dtype=torch.int32, device=device)
    mask = torch.empty(rows, width, dtype=torch.bool, device=device)
    taken = torch.zeros((), dtype=torch.int64, device=device)
    norms, strides = norms.contiguous(), weights.stride()
    whole = weights.stride(1) == 1 and multiples_of_16(weights, columns, width, weights.stride(0))
    _, count, write = _ALIGNED if whole else _GENERAL
    tile = tile_of(columns)
    launch(
        count, (min(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS),),
        weights, norms, threshold.to(device, torch.int64), ties.to(device, torch.int64), state, tied,
        rows, columns, *strides, **tile,
    )  # fmt: skip
    tile = tile_of(width)
    launch(
        write, (triton.cdiv(rows, tile["ROWS"]),),
        weights, norms, state, tied, mask.view(torch.uint8), taken, rows, columns, width, *strides, **tile,
    )  # fmt: skip
    return mask, taken
