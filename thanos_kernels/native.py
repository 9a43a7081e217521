"""The C++ backend for CPU tensors: ``csrc/`` behind the interface of ``reference.py``.

The environment variable THANOS_ISA (avx512bf16, avx512, avx2 or portable) forces an instruction set below the best.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("thanos_kernels._C") is not None:
    import thanos_kernels._C as _C

    if "THANOS_ISA" in os.environ:
        _C.use_isa(os.environ["THANOS_ISA"])
else:  # a pure-PyTorch install
    _C = None  # type: ignore[assignment]


def available() -> bool:
    """Whether the extension was built."""
    return _C is not None


def takes(operation: str, *tensors: Tensor) -> bool:
    """Whether ``operation`` on these CPU tensors has a native path: float32 throughout, 16-bit activations aside."""
    return operation in globals() and tensors[0].dtype == torch.float32


def require(operation: str, *tensors: Tensor) -> None:
    """Refuse what the native backend cannot run, with the reason."""
    if not available():
        raise RuntimeError("backend='native' needs the C++ extension: reinstall the package with a C++ compiler at hand")
    if tensors[0].device.type != "cpu":
        raise ValueError(f"backend='native' runs on CPU tensors, not on {tensors[0].device}")
    if not takes(operation, *tensors):
        raise TypeError(f"{operation}: backend='native' takes float32, not {tensors[0].dtype}; use backend='reference'")
