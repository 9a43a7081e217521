"""The Triton backend, for CUDA and ROCm tensors: one file a kernel, loaded at the first use.

With ``TRITON_INTERPRET=1`` in the environment, before that first use, the kernels run on CPU tensors, in Triton's
interpreter.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor

MINIMUM = (3, 4)  # the first whose knobs and autotuner the kernels use as they do
MAX_WIDTH = 2048  # of a row solve
MAX_GROUP = 32  # m of n:m
_MODULES = {
    "row_solve": "row_solve",
    "select_smallest": "select",
    "count_scores": "select_shared",
    "select_below": "select_shared",
    "select_per_row": "select_groups",
    "select_n_of_m": "select_groups",
    "column_sweep": "sweep",
    "column_sweep_n_of_m": "sweep",
    "accumulate_hessian": "hessian",
}
OPERATIONS = tuple(_MODULES)


def _installed() -> tuple[int, ...] | None:
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return tuple(int(part) for part in re.findall(r"\d+", metadata.version(distribution))[:3])
        except metadata.PackageNotFoundError:
            continue
    return None


_VERSION = _installed()


def version() -> tuple[int, ...] | None:
    """The version of the Triton installed, or None."""
    return _VERSION


def interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def available() -> bool:
    """Whether kernels can run here: Triton is there and recent enough, and so is a GPU or the interpreter."""
    installed = version()
    return installed is not None and installed >= MINIMUM and (interpreted() or torch.cuda.is_available())


def refusal(operation: str, *tensors: Tensor, group: int = 1) -> Exception | None:
    """Why the kernel of ``operation`` cannot take these tensors, or None.

    Args:
        tensors: the first is the one worked on, (c, B) but for ``accumulate_hessian``.
        group: m of n:m.
    """
    installed, needed = version(), ".".join(map(str, MINIMUM))
    if installed is None:
        return RuntimeError(f"backend='triton' needs Triton {needed} or newer: pip install triton")
    if installed < MINIMUM:
        found = ".".join(map(str, installed))
        return RuntimeError(f"backend='triton' needs Triton {needed} or newer, not {found}: upgrade PyTorch and Triton")
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return ValueError(
            f"{operation}: backend='triton' runs on CUDA and ROCm tensors, not on {device}: move the tensors, "
            "choose another backend, or set TRITON_INTERPRET=1 to try it on the CPU"
        )
    if operation not in _MODULES:  # a product of the library's
        return None
    if tensors[0].dtype != torch.float32 or any(tensor.dtype == torch.float64 for tensor in tensors):
        dtype = next((t.dtype for t in tensors if t.dtype == torch.float64), tensors[0].dtype)
        return TypeError(f"{operation}: backend='triton' works in float32, not in {dtype}; use backend='reference'")
    if operation == "row_solve" and tensors[0].shape[1] > MAX_WIDTH:
        return ValueError(
            f"row_solve: backend='triton' takes blocks of at most {MAX_WIDTH} columns, not {tensors[0].shape[1]}: "
            "choose a smaller block size or backend='reference'"
        )
    if group > MAX_GROUP:
        return ValueError(
            f"{operation}: backend='triton' takes n:m with m up to {MAX_GROUP}, not {group}; use backend='reference'"
        )
    return None


def function(operation: str) -> Callable[..., Any]:
    """The function of ``operation``, with the signature it has in ``reference.py``."""
    language = sys.modules.get("triton.language")
    if interpreted() and language is not None and type(language.sum).__name__ == "JITFunction":
        raise RuntimeError("TRITON_INTERPRET=1 was set after Triton was imported: set it before Python starts")
    implementation: Callable[..., Any] = getattr(
        import_module(f"thanos_kernels.triton.{_MODULES[operation]}"), operation
    )
    return implementation
