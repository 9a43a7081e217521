"""SparseGPT's compensation inside a block, ``factor[q, q].T @ e[q] = w[q]`` for each row, left to right.

A program sweeps ROWS rows in panels of 32 columns. What the panels before do to a panel is one product, ``E_before @
factor[before, panel]``, on the matrix units; inside a panel, column j gives ``e_j = w_j / factor[j, j]`` where it is
removed, and ``w -= e_j factor[j, :]``. For n:m the mask of a group is chosen when its first column is reached, by n
times taking the smallest ``abs(w) / factor[k, k]`` left; a panel then holds whole groups, 32 // m of them.

Cost a row: B^2 / 2 multiply-adds on the matrix units and 64 B on the ordinary ones; 4 B bytes of weights read and
written, and the factor's triangle from L2 once a program. B is not limited.

Configurations: 32 rows, so that 4096 rows make 128 programs, about one for each multiprocessor; the sweep is a chain of
B dependent steps of a 32 x 32 tile, over 4 or 8 warps: at 2 it
spills registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton.common import general, launch, precision, tuned

MAX_GROUP = 32
_ROWS, _PANEL = 32, 32
_CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (4, 8)]


@triton.jit
def _panel_weights(
    factor, weights, errors, row, column, inside, start, rows, width, stride_row, stride_column,
    STEP: tl.constexpr, PANEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The panel's weights less what the errors of the panels before do to them."""
    lane = tl.arange(0, PANEL)
    place = weights + row[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    work = tl.load(place, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    for before in range(0, start, STEP):
        k = before + lane
        known = lane < STEP
        e = tl.load(errors + row[:, None] * width + k[None, :], mask=(row < rows)[:, None] & known[None, :], other=0.0)
        beside = factor + k.to(tl.int64)[:, None] * width + column[None, :]
        f = tl.load(beside, mask=known[:, None] & inside[None, :], other=0.0)
        work -= tl.dot(e, f, input_precision=PRECISION)
    return work


@general
def sweep(
    factor, weights, mask, errors, rows: tl.int32, width: tl.int32, stride_row: tl.int64, stride_column,
    ROWS: tl.constexpr, PANEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The errors E (c, B) for a given mask."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PANEL)
    for start in range(0, width, PANEL):
        column = start + lane
        inside = column < width
        work = _panel_weights(
            factor, weights, errors, row, column, inside, start, rows, width, stride_row, stride_column,
            PANEL, PANEL, PRECISION,
        )  # fmt: skip
        held = (row < rows)[:, None] & inside[None, :]
        chosen = tl.load(mask + row[:, None] * width + column[None, :], mask=held, other=0)
        panel = tl.zeros((ROWS, PANEL), tl.float32)
        for j in range(tl.minimum(PANEL, width - start)):
            here = (lane == j)[None, :]
            pivots = factor + tl.cast(start + j, tl.int64) * width
            along = tl.load(pivots + column, mask=inside, other=0.0)
            diagonal = tl.load(pivots + start + j)
            removed = tl.sum(tl.where(here, chosen.to(tl.float32) * work, 0.0), 1)
            error = tl.div_rn(removed, diagonal + removed * 0)
            work = tl.fma(-error[:, None], along[None, :], work)
            panel = tl.where(here, error[:, None], panel)
        tl.store(errors + row[:, None] * width + column[None, :], panel, mask=held)
        tl.debug_barrier()  # the next panel reads what other threads have stored


@general
def sweep_n_of_m(
    factor, weights, mask, errors, rows: tl.int32, width: tl.int32, n: tl.int32, m: tl.int32,
    stride_row: tl.int64, stride_column,
    STEP: tl.constexpr, ROWS: tl.constexpr, PANEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The errors E (c, B) and the mask, chosen as the sweep goes; STEP columns a panel, whole groups."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PANEL)
    for start in range(0, width, STEP):
        column = start + lane
        inside = (lane < STEP) & (column < width)
        work = _panel_weights(
            factor, weights, errors, row, column, inside, start, rows, width, stride_row, stride_column,
            STEP, PANEL, PRECISION,
        )  # fmt: skip
        diagonals = tl.load(factor + column.to(tl.int64) * width + column, mask=inside, other=1.0)
        panel = tl.zeros((ROWS, PANEL), tl.float32)
        chosen = tl.zeros((ROWS, PANEL), tl.int32)
        for j in range(tl.minimum(STEP, width - start)):
            here = (lane == j)[None, :]
            if j % m == 0:
                group = ((lane >= j) & (lane < j + m))[None, :]
                score = tl.where(
                    group, tl.div_rn(tl.abs(work), tl.broadcast_to(diagonals[None, :], (ROWS, PANEL))), 0.0
                )
                for _ in range(n):
                    left = tl.where(group & (chosen == 0), score, float("inf"))
                    best = tl.min(left, 1)
                    at = tl.where(group & (chosen == 0) & (left == best[:, None]), lane[None, :], PANEL)
                    chosen = tl.where(lane[None, :] == tl.min(at, 1)[:, None], 1, chosen)
            pivots = factor + tl.cast(start + j, tl.int64) * width
            along = tl.load(pivots + column, mask=inside, other=0.0)
            diagonal = tl.load(pivots + start + j)
            removed = tl.sum(tl.where(here, chosen.to(tl.float32) * work, 0.0), 1)
            error = tl.div_rn(removed, diagonal + removed * 0)
            work = tl.fma(-error[:, None], along[None, :], work)
            panel = tl.where(here, error[:, None], panel)
        held = (row < rows)[:, None] & inside[None, :]
        tl.store(errors + row[:, None] * width + column[None, :], panel, mask=held)
        tl.store(mask + row[:, None] * width + column[None, :], chosen.to(tl.uint8), mask=held)
        tl.debug_barrier()  # the next panel reads what other threads have stored


_tuned = tuned(_CONFIGS, key=["width"])(sweep)
_tuned_n_of_m = tuned(_CONFIGS, key=["width", "m"])(sweep_n_of_m)


def column_sweep(factor: Tensor, weights: Tensor, mask: Tensor, *, products: str | None = None) -> Tensor:
    """As ``reference.column_sweep``, for float32."""
    rows, width = weights.shape
    errors = torch.empty(rows, width, dtype=torch.float32, device=weights.device)
    if errors.numel():
        launch(
            _tuned, (triton.cdiv(rows, _ROWS),),
            factor.contiguous(), weights, mask.contiguous().view(torch.uint8), errors, rows, width,
            *weights.stride(), ROWS=_ROWS, PANEL=_PANEL, PRECISION=products or precision(),
        )  # fmt: skip
    return errors


def column_sweep_n_of_m(
    factor: Tensor, weights: Tensor, n: int, m: int, *, products: str | None = None
) -> tuple[Tensor, Tensor]:
    """As ``reference.column_sweep_n_of_m``, for float32 and m up to 32."""
    rows, width = weights.shape
    errors = torch.empty(rows, width, dtype=torch.float32, device=weights.device)
    mask = torch.empty(rows, width, dtype=torch.bool, device=weights.device)
    if errors.numel():
        launch(
            _tuned_n_of_m, (triton.cdiv(rows, _ROWS),),
            factor.contiguous(), weights, mask.view(torch.uint8), errors, rows, width, n, m, *weights.stride(),
            STEP=_PANEL // m * m, ROWS=_ROWS, PANEL=_PANEL, PRECISION=products or precision(),
        )  # fmt: skip
    return errors, mask
