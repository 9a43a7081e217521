"""What the kernels share: how accurate float32 products are, how configurations are tried, and how they compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


def precision(hip: bool = torch.version.hip is not None) -> str:
    """How ``tl.dot`` multiplies float32: with full float32 accuracy on every chip.

    NVIDIA's matrix units take TF32 (11 bits), so a product is split into three TF32 products (``tf32x3``), which keeps
    22 bits: some 160 TFLOP/s on an H100, where ``ieee`` would run on the ordinary units at 67. AMD's take float32 as it
    is, so there ``ieee`` already runs on the matrix units. Plain ``tf32`` is never chosen here: with 11 bits, Cholesky
    breaks down for a condition number above 2000. A caller of the functions in this folder may ask for it.
    """
    return "ieee" if hip else "tf32x3"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def tuned(configs: Sequence[triton.Config], key: list[str], restore: Sequence[str] = ()) -> Callable[[Any], Any]:
    """``triton.autotune``; in the interpreter, whose times mean nothing, the first configuration alone."""
    chosen = list(configs[:1]) if interpreted() else list(configs)
    tune: Callable[[Any], Any] = triton.autotune(configs=chosen, key=key, restore_value=list(restore))
    return tune


@dataclass(frozen=True)
class Variant:
    """One way a kernel may be launched, for compilation ahead of time.

    Attributes:
        name: unique among all variants.
        kernel: the ``@triton.jit`` function.
        types: the Triton type of each argument that is not a compile-time constant, in order, blank-separated;
            ``i32:16`` is an integer divisible by 16, as Triton distinguishes them at a launch.
        constants: the compile-time constants.
        warps, stages: as in ``triton.Config``.
        matrix: whether the compiled code must hold matrix instructions.
    """

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 1
    matrix: bool = False
