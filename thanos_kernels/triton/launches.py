"""Every operation at the shapes of real layers and at the odd ones, as calls to be recorded (``recorder.py``).

Tensors lie on the meta device, so that a layer of any size costs nothing: types, shapes, strides and alignment are all
that a launch is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from thanos_kernels import triton as backend

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672), (53248, 16384))  # of 8B, 70B and 405B models
ODD = ((1, 1), (1, 7), (7, 1), (1, 4096), (4096, 1), (35, 70), (16, 16), (9, 2000))
BLOCKS = (1, 2, 3, 16, 33, 64, 65, 100, 128, 130, 256, 512, 1000, 1024, 2048)
HEAD = 1 << 17  # rows of an output head; of wide blocks, more than one chunk of a row solve
GROUPS = ((2, 4), (1, 4), (4, 8), (1, 1), (1, 2), (3, 5), (6, 12), (16, 32), (7, 31))
INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layouts(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """A (rows, columns) tensor in every way it may lie in memory."""
    new = partial(empty, dtype=dtype)
    yield new(rows, columns)
    yield new(rows, columns + 128)[:, 128:]  # a block of a wider matrix
    yield new(rows, columns + 1)[:, 1:]  # at an odd address
    yield new(columns, rows).T
    yield new(2 * rows, 3 * columns)[::2, ::3]
    yield new(columns).expand(rows, columns)


def block(width: int) -> Tensor:
    """The first columns of a layer of more than 2 GiB, which AMD's compiler is given."""
    rows, columns = LAYERS[-1]
    return empty(rows, max(width, columns))[:, :width]


def calls(operation: str) -> Iterator[Callable[[], object]]:
    """Calls of one operation of ``triton.OPERATIONS``."""
    run = backend.function(operation)
    for arguments in _ARGUMENTS[operation]():
        yield partial(run, *arguments)


def _row_solve() -> Iterator[tuple[object, ...]]:
    for width in BLOCKS:
        for weights in (block(width), empty(1, width), empty(HEAD, width), *layouts(35, width)):
            out, info = empty(*weights.shape), empty(len(weights), dtype=torch.int32)
            yield empty(width, width), weights, empty(*weights.shape, dtype=torch.bool), out, info
        for mask in layouts(48, width, torch.bool):
            yield empty(width, width), empty(48, width), mask, empty(48, width), empty(48, dtype=torch.int32)


def _select_smallest() -> Iterator[tuple[object, ...]]:
    for rows, columns in LAYERS + ODD:
        count = empty(dtype=torch.int64)
        for weights in layouts(rows, columns):
            for width in {1, min(columns, 128), columns}:
                if weights.numel() < 1 << 31:
                    yield weights, empty(columns), count, width
        for start in (1, 128):  # the norms of the columns that are left
            if start < columns:
                yield empty(rows, columns)[:, start:], empty(columns)[start:], count, min(columns - start, 128)


def _count_scores() -> Iterator[tuple[object, ...]]:
    for rows, columns in LAYERS + ODD:
        for weights in layouts(rows, columns):
            for shift, bits in ((15, 16), (0, 15)):
                yield weights, empty(columns), empty(dtype=torch.int64), shift, bits


def _select_below() -> Iterator[tuple[object, ...]]:
    for rows, columns in LAYERS + ODD:
        for weights in layouts(rows, columns):
            for width in {1, min(columns, 128), columns}:
                threshold, ties = empty(dtype=torch.int64), empty(dtype=torch.int64)
                yield weights, empty(columns), threshold, ties, width


def _select_per_row() -> Iterator[tuple[object, ...]]:
    for rows, columns in LAYERS + ODD:
        for weights in layouts(rows, columns):
            for count in {1, columns // 2, columns}:
                yield weights, empty(columns), count


def _select_n_of_m() -> Iterator[tuple[object, ...]]:
    for n, m in GROUPS:
        for rows, columns in LAYERS + ODD:
            for scores in layouts(rows, -(-columns // m) * m):
                yield scores, n, m


def _column_sweep() -> Iterator[tuple[object, ...]]:
    for width in (*BLOCKS, 4096, 16384, 53248):
        for weights in (block(width), empty(1, width), empty(16384, width), *layouts(7, width)):
            yield empty(width, width), weights, empty(*weights.shape, dtype=torch.bool)
        for mask in layouts(48, width, torch.bool):
            yield empty(width, width), empty(48, width), mask


def _column_sweep_n_of_m() -> Iterator[tuple[object, ...]]:
    for n, m in GROUPS:
        for width in (m, 2 * m, 512 // m * m):
            for weights in (empty(1, width), empty(16384, width), *layouts(7, width)):
                yield empty(width, width), weights, n, m
    for width in (512, 16384, 53248):
        for weights in (block(width), empty(16384, width)):
            yield empty(width, width), weights, 2, 4


def _accumulate_hessian() -> Iterator[tuple[object, ...]]:
    for dtype in INPUTS:
        for width in (1, 7, 35, 144, 4096, 28672, 53248):
            for tokens in (1, 5, 2048, 1 << 20):
                for inputs in layouts(tokens, width, dtype):
                    yield empty(width, width), inputs, 0.25
        odd = empty(4096 * 4096 + 1)[1:].view(4096, 4096)
        yield odd, empty(2048, 4096, dtype=dtype), 0.25


_ARGUMENTS: dict[str, Callable[[], Iterator[tuple[object, ...]]]] = {
    "row_solve": _row_solve,
    "select_smallest": _select_smallest,
    "count_scores": _count_scores,
    "select_below": _select_below,
    "select_per_row": _select_per_row,
    "select_n_of_m": _select_n_of_m,
    "column_sweep": _column_sweep,
    "column_sweep_n_of_m": _column_sweep_n_of_m,
    "accumulate_hessian": _accumulate_hessian,
}
