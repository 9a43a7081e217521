"""Row solve: for each row i with masked columns q, ``gram[q, q] @ x = weights[i, q]`` (the paper's ``u R^-1``).

Every row has its own system of its own size s. Three kernels share the work, with no wait for the device between them:

1. *Plan*, one program a row: count the masked columns, list them, put the row into the bucket of its count (an atomic
   add hands out the places), zero its output.
2. *Pairs*, for counts up to 128: the system lives in registers as two diagonal tiles F + S (16+16, 32+32, 32+64,
   64+64) and ``gram`` is gathered straight into them. Gauss-Jordan elimination, which is forward stable for positive
   definite systems (Higham, Accuracy and Stability of Numerical Algorithms, 14.4), turns ``[A11 | A12 | w1]`` into
   ``[D | A11^-1 A12 | A11^-1 w1]``, and each of its steps takes its share from A22 and w2, so that what remains is
   ``(A22 - A21 A11^-1 A12) x2 = w2 - A21 A11^-1 w1`` and ``x1 = A11^-1 w1 - (A11^-1 A12) x2``. All in float32 on the
   ordinary units: a product on the matrix units would hold three copies of its operands in registers and spill.
   Two tiles rather than one: a register tile cannot shrink as the elimination proceeds. A step costs 5 operations an
   element of A11 (two sums under a mask, one multiply-add), 3 of A12 and 1 of A22.
3. *Blocked* (``row_solve_blocked.py``), for larger counts.

Padding is an identity row and a zero right-hand side; elimination stops at the row's own count, so that padding costs
width, not steps. A pivot that is not positive is reported, and its row's multipliers are zero.

Configurations: a program has as many warps as keep a tile element row in 8 to 32 registers a thread: the elimination is
a chain of s dependent steps, each a reduction over the tile, so fewer warps make a step shorter (no barrier at one
warp) until registers run out. The tuner may choose twice as many. Launches are *persistent*: each program takes rows
from its bucket in turn, as the size of a bucket is known on the device alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton import row_solve_blocked
from thanos_kernels.triton.common import general, launch, precision, tuned
from thanos_kernels.triton.row_solve_blocked import gather

PAIRS = ((16, 16), (32, 32), (32, 64), (64, 64))  # tile sizes; their sums are the buckets' limits
LIMITS = tuple(first + second for first, second in PAIRS)
MAX_WIDTH = 2048  # columns are listed as int16 and a blocked system of this size takes 8 MiB
WORKSPACE = 512 << 20  # bytes
_PROGRAMS = 2048  # enough to fill any chip; each takes rows in turn
_BLOCK = 32  # columns that a plan looks at, at least
_WARPS = {(16, 16): 1, (32, 32): 2, (32, 64): 4, (64, 64): 8}


@general
def plan(
    mask, out, index, counts, order, filled, info,
    rows: tl.int32, width: tl.int32,
    LIMIT1: tl.constexpr, LIMIT2: tl.constexpr, LIMIT3: tl.constexpr, LIMIT4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List a row's masked columns, and the row in its bucket. Reads B bytes and writes 6 B."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    taken = tl.load(mask + row * width + columns, mask=inside, other=0).to(tl.int32)
    place = tl.cumsum(taken, 0) - 1
    count = tl.sum(taken, 0)
    tl.store(index + row * width + place, columns.to(tl.int16), mask=taken > 0)
    tl.store(out + row * width + columns, tl.zeros_like(columns).to(tl.float32), mask=inside)
    tl.store(counts + row, count)
    tl.store(info + row, 0)
    bucket = (
        (count > LIMIT1).to(tl.int32)
        + (count > LIMIT2).to(tl.int32)
        + (count > LIMIT3).to(tl.int32)
        + (count > LIMIT4).to(tl.int32)
    )
    position = tl.atomic_add(filled + bucket, 1, mask=count > 0)
    tl.store(order + bucket.to(tl.int64) * rows + position, row.to(tl.int32), mask=count > 0)


@triton.jit
def _eliminate_first(a, b, c, y, z, steps, FIRST: tl.constexpr):
    """Gauss-Jordan elimination of ``steps`` columns of ``[a | b | y]``, and of the rows ``[. | c | z]`` below it.

    What stands below a is b transposed: while it is eliminated the rest stays symmetric. Returns ``a^-1 b``, the Schur
    complement of c, ``a^-1 y``, the remaining right-hand side, and where the first bad pivot stood, 1-based.
    """
    lane = tl.arange(0, FIRST)
    pivots = tl.full((FIRST,), 1.0, tl.float32)
    failed = 0
    for j in range(steps):
        here = lane == j
        row_a = tl.sum(tl.where(here[:, None], a, 0.0), 0)
        row_b = tl.sum(tl.where(here[:, None], b, 0.0), 0)
        column = tl.sum(tl.where(here[None, :], a, 0.0), 1)
        pivot = tl.sum(tl.where(here, row_a, 0.0), 0)
        right = tl.sum(tl.where(here, y, 0.0), 0)
        good = pivot > 0
        failed = tl.where(good | (failed > 0), failed, j + 1)
        pivot = tl.where(good, pivot, 1.0)
        above = tl.where(here, 0.0, -column / pivot)
        below = -row_b / pivot
        a = tl.fma(above[:, None], row_a[None, :], a)
        b = tl.fma(above[:, None], row_b[None, :], b)
        c = tl.fma(below[:, None], row_b[None, :], c)
        y = tl.fma(above, right, y)
        z = tl.fma(below, right, z)
        pivots = tl.where(here, pivot, pivots)
    return b / pivots[:, None], c, y / pivots, z, failed


@triton.jit
def _eliminate_second(c, z, steps, failed, before, SECOND: tl.constexpr):
    """Gauss-Jordan elimination of ``[c | z]``; bad pivots are counted from ``before``. Returns ``c^-1 z``."""
    lane = tl.arange(0, SECOND)
    pivots = tl.full((SECOND,), 1.0, tl.float32)
    for j in range(steps):
        here = lane == j
        row = tl.sum(tl.where(here[:, None], c, 0.0), 0)
        column = tl.sum(tl.where(here[None, :], c, 0.0), 1)
        pivot = tl.sum(tl.where(here, row, 0.0), 0)
        right = tl.sum(tl.where(here, z, 0.0), 0)
        good = pivot > 0
        failed = tl.where(good | (failed > 0), failed, before + j + 1)
        pivot = tl.where(good, pivot, 1.0)
        factor = tl.where(here, 0.0, -column / pivot)
        c = tl.fma(factor[:, None], row[None, :], c)
        z = tl.fma(factor, right, z)
        pivots = tl.where(here, pivot, pivots)
    return z / pivots, failed


@general
def pairs(
    gram, weights, out, index, counts, order, filled, info,
    bucket: tl.int32, rows: tl.int32, width: tl.int32, stride_row: tl.int64, stride_column,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Solve the systems of one bucket in registers: s^2 floats gathered and some s (F + S)^2 multiply-adds a row."""
    lane1, lane2 = tl.arange(0, FIRST), tl.arange(0, SECOND)
    after = FIRST + lane2
    for item in range(tl.program_id(0), tl.load(filled + bucket), tl.num_programs(0)):
        row = tl.load(order + bucket.to(tl.int64) * rows + item).to(tl.int64)
        count = tl.load(counts + row)
        columns = index + row * width
        q1 = tl.load(columns + lane1, mask=lane1 < count, other=0).to(tl.int32)
        q2 = tl.load(columns + after, mask=after < count, other=0).to(tl.int32)
        start = weights + row * stride_row
        y = tl.load(start + q1.to(tl.int64) * stride_column, mask=lane1 < count, other=0.0)
        z = tl.load(start + q2.to(tl.int64) * stride_column, mask=after < count, other=0.0)
        a = gather(gram, width, lane1, lane1, count, q1, q1)
        b = gather(gram, width, lane1, after, count, q1, q2)
        c = gather(gram, width, after, after, count, q2, q2)
        b, c, y, z, failed = _eliminate_first(a, b, c, y, z, tl.minimum(count, FIRST), FIRST)
        x2, failed = _eliminate_second(c, z, tl.maximum(count - FIRST, 0), failed, FIRST, SECOND)
        x1 = y - tl.sum(b * x2[None, :], 1)
        kept = tl.where(failed == 0, count, 0)
        tl.store(out + row * width + q1, x1, mask=lane1 < kept)
        tl.store(out + row * width + q2, x2, mask=after < kept)
        bad = tl.load(columns + failed - 1, mask=failed > 0, other=-1).to(tl.int32)
        tl.store(info + row, bad + 1)


def _configs(pair: tuple[int, int]) -> list[triton.Config]:
    return [triton.Config({}, num_warps=warps, num_stages=1) for warps in (_WARPS[pair], 2 * _WARPS[pair])]


_TUNED_PAIRS = {pair: tuned(_configs(pair), key=["FIRST", "SECOND"])(pairs) for pair in PAIRS}


def row_solve(
    gram: Tensor,
    weights: Tensor,
    mask: Tensor,
    out: Tensor,
    info: Tensor,
    *,
    workspace: int = WORKSPACE,
    products: str | None = None,
) -> None:
    """As ``reference.row_solve``, for float32 and B up to 2048.

    Args:
        workspace: bytes of device memory to work in. Rows are planned in chunks, and as many blocked systems are in
            flight at once, as fit.
        products: the precision of ``tl.dot``; see ``common.precision``.
    """
    rows, width = weights.shape
    gram = gram.contiguous()
    taken = mask.contiguous().view(torch.uint8)
    products = products or precision()
    buckets = len(LIMITS) + 1
    bytes_per_row = 2 * width + 4 * (buckets + 1)
    half = workspace // 2 if width > LIMITS[-1] else workspace
    chunk = max(1, min(rows, half // bytes_per_row))
    device = weights.device
    index = torch.empty(chunk * width, dtype=torch.int16, device=device)
    counts = torch.empty(chunk, dtype=torch.int32, device=device)
    order = torch.empty(buckets * chunk, dtype=torch.int32, device=device)
    scratch = row_solve_blocked.scratch(width, chunk, half, device) if width > LIMITS[-1] else None
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        size = part.stop - start
        filled = torch.zeros(buckets, dtype=torch.int32, device=device)
        launch(
            plan, (size,),
            taken[part], out[part], index, counts, order, filled, info[part],
            size, width, *LIMITS, BLOCK=max(_BLOCK, triton.next_power_of_2(width)), num_warps=1 if width <= 512 else 4,
        )  # fmt: skip
        for bucket, pair in enumerate(PAIRS):
            if bucket == 0 or width > LIMITS[bucket - 1]:
                launch(
                    _TUNED_PAIRS[pair], (min(size, _PROGRAMS),),
                    gram, weights[part], out[part], index, counts, order, filled, info[part],
                    bucket, size, width, weights.stride(0), weights.stride(1),
                    FIRST=pair[0], SECOND=pair[1],
                )  # fmt: skip
        if scratch is not None:
            row_solve_blocked.launch(
                gram, weights[part], out[part], index, counts, order, filled, info[part], len(PAIRS), scratch, products
            )
