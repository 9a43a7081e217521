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
    """Holds 8192 floats, and what they become, in the registers of 32 threads."""
    row, column = tl.arange(0, 64), tl.arange(0, 128)
    place = out + row[:, None] * 128 + column[None, :]
    a = tl.load(place)
    tl.store(place, a + tl.sum(a, 0)[None, :] * tl.sum(a, 1)[:, None])
