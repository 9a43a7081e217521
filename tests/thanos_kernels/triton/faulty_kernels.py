"""Kernels with the faults that the recorder is there to find."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def method_of_a_number(out, number):
    """Does not compile where the number is 1, which the JIT takes for a constant."""
    tl.store(out, number.to(tl.float32))


@triton.jit
def too_large(out):
    """Holds 16384 floats, which are alive at once, in the registers of 32 threads."""
    lane = tl.arange(0, 128)
    a = tl.load(out + lane[:, None] * 128 + lane[None, :])
    for _ in range(8):
        a = a + tl.sum(a, 0)[None, :] * tl.sum(a, 1)[:, None]
    tl.store(out + lane[:, None] * 128 + lane[None, :], a)
