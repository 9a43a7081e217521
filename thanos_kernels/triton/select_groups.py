"""Selection inside rows and inside groups of m: Wanda's comparison group, and n:m."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton.common import aligned, general, launch, multiples_of_16
from thanos_kernels.triton.select import score_bits

MAX_GROUP = 32
_GROUPS = 1024  # lanes of a program that selects in groups
_TILE = {"ROWS": 8, "COLUMNS": 512}


@general
def per_row(
    weights, norms, mask, count: tl.int32, rows: tl.int32, columns: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The ``count`` smallest ``abs(w) * norm`` of each row, ties to the lower index.

    A row's threshold is built from its highest bit down: a bit stays where fewer than ``count`` scores lie below the
    threshold with it. That reads the rows 31 times, once from memory and then from L1 or L2, and needs no counters; 8
    rows a program share each of the 31 reductions, 8 x 512 elements at a time, 32 loads in flight a
    thread with 4 warps.
    4 bytes read and 1 written an element, besides.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    threshold = tl.zeros((ROWS,), tl.int32)
    smaller = tl.zeros((ROWS,), tl.int32)
    for step in range(31):
        trial = threshold | (1 << (30 - step))
        below = tl.zeros((ROWS,), tl.int32)
        for start in range(0, columns, COLUMNS):
            column = start + lane
            bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
            below += tl.sum(((bits < trial[:, None]) & (column < columns)[None, :]).to(tl.int32), 1)
        threshold = tl.where(below < count, trial, threshold)
        smaller = tl.where(below < count, below, smaller)
    place = mask + row.to(tl.int64)[:, None] * columns
    before = tl.zeros((ROWS,), tl.int32)
    for start in range(0, columns, COLUMNS):
        column = start + lane
        bits = score_bits(weights, norms, row, column, rows, columns, stride_row, stride_column)
        equal = (bits == threshold[:, None]).to(tl.int32)
        order = (smaller + before)[:, None] + tl.cumsum(equal, 1) - equal
        chosen = (bits < threshold[:, None]) | ((equal > 0) & (order < count))
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(place + column[None, :], chosen.to(tl.uint8), mask=inside)
        before += tl.sum(equal, 1)


@general
def n_of_m(
    scores, mask, n: tl.int32, m: tl.int32, groups: tl.int64, groups_per_row: tl.int32,
    stride_row: tl.int64, stride_column,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The n smallest of each group of m, ties to the lower index: one pass, 4 bytes read and 1 written an element.

    A score is taken where fewer than n of its group are smaller, or equal and to the left: m comparisons an element,
    each with a score that the program loads again, from L1. A tile is GROUPS x SIZE, SIZE the power of two that
    holds m, 1024 elements to 4 warps.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, SIZE)
    inside = (group < groups)[:, None] & (lane < m)[None, :]
    row, first = group // groups_per_row, group % groups_per_row * m
    start = scores + row * stride_row + first * stride_column
    score = tl.load(start[:, None] + lane.to(tl.int64)[None, :] * stride_column, mask=inside, other=0.0)
    rank = tl.zeros((GROUPS, SIZE), tl.int32)
    for j in range(m):
        other = tl.load(start + tl.cast(j, tl.int64) * stride_column, mask=group < groups, other=0.0)[:, None]
        rank += ((other < score) | ((other == score) & (j < lane)[None, :])).to(tl.int32)
    place = mask + (group * m)[:, None] + lane[None, :]
    tl.store(place, (rank < n).to(tl.uint8), mask=inside)


_per_row = aligned(per_row.fn, "weights", "columns", "stride_row")


def select_per_row(weights: Tensor, norms: Tensor, count: int) -> Tensor:
    """As ``reference.select_per_row``, for float32."""
    rows, columns = weights.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=weights.device)
    if count and mask.numel():
        whole = weights.stride(1) == 1 and multiples_of_16(weights, columns, weights.stride(0))
        launch(
            _per_row if whole else per_row, (triton.cdiv(rows, _TILE["ROWS"]),),
            weights, norms.contiguous(), mask.view(torch.uint8), count, rows, columns, *weights.stride(), **_TILE,
        )  # fmt: skip
    return mask


def select_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """As ``reference.select_n_of_m``, for float32 and m up to 32."""
    rows, columns = scores.shape
    mask = torch.empty(rows, columns, dtype=torch.bool, device=scores.device)
    groups = rows * columns // m
    if groups:
        size = triton.next_power_of_2(m)
        launch(
            n_of_m, (triton.cdiv(groups, _GROUPS // size),),
            scores, mask.view(torch.uint8), n, m, groups, columns // m, *scores.stride(),
            GROUPS=_GROUPS // size, SIZE=size,
        )  # fmt: skip
    return mask
