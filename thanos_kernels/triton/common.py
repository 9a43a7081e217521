"""What the kernels share: how they are compiled and launched, how accurate float32 products are, and their tuning.

Triton's JIT compiles a launch anew for each form of its arguments: it takes an integer that is 1 for a constant, and
notes which integers and addresses are multiples of 16. So that the forms are few, all of them tried before a user meets
one (``recorder.py``), kernels here are ``general``: a scalar argument is annotated with its type and is just that,
whatever its value. Only ``stride_column`` is left to the JIT, which makes it a constant where it is 1. Where wide loads
pay, a kernel has a second form, ``aligned``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from thanos_kernels import device


def general(function: Callable[..., Any]) -> Any:
    """``triton.jit`` of a kernel for arguments of any value and address."""
    return aligned(function)


def aligned(function: Callable[..., Any], *names: str) -> Any:
    """``triton.jit`` of a kernel to be launched where the arguments of these names are ``multiples_of_16`` alone.

    Args:
        function: what a kernel is made of (``kernel.fn`` of another form of it).
        names: may hold more than the kernel has.
    """
    arguments = inspect.signature(function).parameters.values()
    rest = [one for one in arguments if one.name not in names and "constexpr" not in str(one.annotation)]
    scalars = [one.name for one in rest if one.annotation is not inspect.Parameter.empty]
    return triton.jit(
        function, do_not_specialize=scalars, do_not_specialize_on_alignment=[one.name for one in rest]
    )  # fmt: skip


def multiples_of_16(*values: Tensor | int) -> bool:
    """Whether these integers, and the addresses in bytes of these tensors, are multiples of 16."""
    return not any((value.data_ptr() if isinstance(value, Tensor) else value) % 16 for value in values)


def launch(kernel: Any, grid: Any, first: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first argument, whichever is current."""
    with device.on(first.device):
        kernel[grid](first, *arguments, **options)


def precision() -> str:
    """How ``tl.dot`` multiplies float32: with full float32 accuracy on every chip.

    NVIDIA's matrix units take TF32 (11 bits), so a product is split into three TF32 products (``tf32x3``), which keeps
    22 bits: some 160 TFLOP/s on an H100, where ``ieee`` would run on the ordinary units at 67. AMD's take float32 as it
    is, so there ``ieee`` already runs on the matrix units. Plain ``tf32`` is never chosen here: with 11 bits, Cholesky
    breaks down for a condition number above 2000. A caller of the functions in this folder may ask for it.
    """
    if interpreted():
        return "ieee" if torch.version.hip is not None else "tf32x3"
    return "ieee" if triton.runtime.driver.active.get_current_target().backend == "hip" else "tf32x3"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def tuned(configs: Sequence[triton.Config], key: list[str], restore: Sequence[str] = ()) -> Callable[[Any], Any]:
    """``triton.autotune``; in the interpreter, whose times mean nothing, the first configuration alone."""
    chosen = list(configs[:1]) if interpreted() else list(configs)
    tune: Callable[[Any], Any] = triton.autotune(configs=chosen, key=key, restore_value=list(restore))
    return tune
