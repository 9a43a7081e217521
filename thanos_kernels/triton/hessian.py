"""Hessian update ``H <- (1 - t) H + t mean(x x.T)``, the lower triangle computed and mirrored.

Program p computes tile (i, j), j <= i, of the b x b result, ``acc = sum over tokens of x[i].T x[j]``, and writes
``H + t (acc / tokens - H)`` there and at (j, i). In this form H is rounded once a call, and the shares of old and new
add up to one whatever t rounds to, so hundreds of calls lose no more than their roundings' random walk, which each
later call shrinks. Only elements on and below the diagonal are read and computed: the result is symmetric to the bit.
The columns' norms are the square roots of its diagonal, at no cost.

Products of bfloat16 and of float16 values are exact in float32, in which they are added up. Float32 inputs are
multiplied with full accuracy (``common.precision``).

Cost: tokens b (b + T) flops on the matrix units; each input is read b / T times, all but once from L2; 8 b^2 bytes of H
written and 2 b^2 read.

Configurations: tiles of 128 x 128 over 8 warps (64 accumulators a thread) make 64 flops of an input byte at 16 bits,
more than L2 must feed; where b is small, tiles of 64 x 64 occupy the chip better. 32 tokens a step, and 3 steps in
flight (2 in float32) hide the latency of memory in at most 64 KiB of shared memory. The tokens are added in the same
order in each configuration, so that tuning never changes a result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thanos_kernels.triton.common import aligned, general, interpreted, launch, multiples_of_16, precision, tuned

_TOKENS = 32
_CONFIGS = [
    triton.Config({"SIZE": 64}, num_warps=4, num_stages=3),
    triton.Config({"SIZE": 128}, num_warps=8, num_stages=3),
]
_CONFIGS_32 = [
    triton.Config({"SIZE": 64}, num_warps=4, num_stages=2),
    triton.Config({"SIZE": 128}, num_warps=8, num_stages=2),
]


@general
def lower_tiles(
    hessian, inputs, tokens: tl.int32, width: tl.int32, share: tl.float32, stride_token: tl.int64,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal, and its mirror image; WIDEN for the interpreter, which knows no bfloat16."""
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += tl.where((i + 1) * (i + 2) // 2 <= tile, 1, 0) - tl.where(i * (i + 1) // 2 > tile, 1, 0)
    j = tile - i * (i + 1) // 2
    row, column = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    token = tl.arange(0, TOKENS)
    left = inputs + token.to(tl.int64)[None, :] * stride_token + row[:, None]
    right = inputs + token.to(tl.int64)[:, None] * stride_token + column[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, tokens, TOKENS):
        here = start + token < tokens
        a = tl.load(left, mask=(row < width)[:, None] & here[None, :], other=0.0)
        b = tl.load(right, mask=here[:, None] & (column < width)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += TOKENS * stride_token
        right += TOKENS * stride_token
    lower = (row[:, None] >= column[None, :]) & (row < width)[:, None]
    corner = hessian + (i * SIZE).to(tl.int64) * width + j * SIZE
    place = corner + (tl.arange(0, SIZE)[:, None] * width + tl.arange(0, SIZE)[None, :])
    old = tl.load(place, mask=lower & (row < tl.where(share < 1, width, 0))[:, None], other=0.0)
    new = tl.fma(total / tokens.to(tl.float32) - old, tl.full((SIZE, SIZE), 1.0, tl.float32) * share, old)
    tl.store(place, new, mask=lower)
    tl.debug_barrier()  # keeps the two sets of addresses from being held in registers at once
    corner = hessian + (j * SIZE).to(tl.int64) * width + i * SIZE
    tl.store(corner + (tl.arange(0, SIZE)[None, :] * width + tl.arange(0, SIZE)[:, None]), new, mask=lower)


_KEY, _RESTORE = ["width"], ["hessian"]
_aligned = aligned(lower_tiles.fn, "hessian", "inputs", "width", "stride_token")
_tuned = tuned(_CONFIGS, _KEY, _RESTORE)(_aligned)
_tuned_32 = tuned(_CONFIGS_32, _KEY, _RESTORE)(_aligned)
_ragged = tuned(_CONFIGS[:1], _KEY, _RESTORE)(lower_tiles)  # loads of single elements: larger tiles would spill


def accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float, *, products: str | None = None) -> None:
    """As ``reference.accumulate_hessian``, for a float32 ``hessian`` and inputs of 16 bits or float32.

    Of ``hessian`` the lower triangle is read, and nothing where ``weight`` is one. Inputs whose columns do not lie side
    by side are copied.
    """
    tokens, width = inputs.shape
    inputs = inputs if inputs.stride(1) == 1 else inputs.contiguous()

    def grid(config: dict[str, int]) -> tuple[int]:
        tiles = triton.cdiv(width, config["SIZE"])
        return (tiles * (tiles + 1) // 2,)

    kernel = _tuned_32 if inputs.dtype == torch.float32 else _tuned
    if not multiples_of_16(hessian, inputs, width, inputs.stride(0)):
        kernel = _ragged
    launch(
        kernel, grid, hessian, inputs, tokens, width, float(weight), inputs.stride(0),
        TOKENS=_TOKENS, PRECISION=products or precision(), WIDEN=interpreted(),
    )  # fmt: skip
