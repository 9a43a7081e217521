"""Which backend runs an operation: named, or the best that takes the tensors at hand.

``auto`` is Triton for CUDA and ROCm tensors, native C++ for CPU tensors and PyTorch for what they leave: float64, sizes
beyond their limits, and products that the library does best. Before a Triton kernel is first used on a device it must
agree with the reference there (``selfcheck.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from thanos_kernels import linalg, native, reference, selfcheck, triton

BACKENDS = ("auto", "native", "triton", "reference")


def backends() -> list[str]:
    """Names of the backends this installation can run."""
    found = {"native": native.available(), "triton": triton.available()}
    return ["reference", *(name for name, there in found.items() if there)]


def check(operation: str, backend: str, *tensors: Tensor, group: int = 1) -> None:
    """Raise where ``backend`` cannot run ``operation`` on these tensors: see :func:`choose`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if any(tensor.device != tensors[0].device for tensor in tensors):
        devices = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"{operation}: the tensors lie on different devices ({devices}); move them to one")
    if backend == "native":
        native.require(operation, *tensors)
    if backend == "triton":
        problem = triton.refusal(operation, *tensors, group=group)
        if problem is not None:
            raise problem


def choose(operation: str, backend: str, *tensors: Tensor, group: int = 1) -> tuple[str, str]:
    """The backend that runs ``operation``, or ``library`` for what PyTorch's own products do best, and why.

    Args:
        backend: ``auto`` or the name of one, which must have passed :func:`check`.
        tensors: all on one device; the first is the one worked on.
        group: m of n:m.
    """
    if backend != "auto":
        return backend, "asked for"
    if operation not in triton.OPERATIONS:
        return "library", "products of PyTorch"
    device = tensors[0].device.type
    if device == "cpu":
        if not native.takes(operation, *tensors):
            return "reference", "no native kernel for this operation and dtype"
        return ("native", "CPU tensors") if native.available() else ("reference", native.ABSENCE)
    if device != "cuda":
        return "reference", f"no kernels for {device}"
    problem = triton.refusal(operation, *tensors, group=group)
    if problem is not None:
        return "reference", str(problem)
    failure = selfcheck.failure(operation, tensors[0].device)
    return ("triton", "agrees with the reference on this device") if failure is None else ("reference", failure)


def implementation(operation: str, backend: str, *tensors: Tensor, group: int = 1) -> Callable[..., Any]:
    """The function that runs ``operation``; what a backend has no kernel for is done by the library's products."""
    chosen, _ = choose(operation, backend, *tensors, group=group)
    if chosen == "reference" and backend == "auto" and native.takes(operation, *tensors):
        native.ready(tensors[0])  # which says that it is missing, where it is
    if chosen == "native" and hasattr(native, operation):
        return _function(native, operation)
    if chosen == "triton" and operation in triton.OPERATIONS:
        return triton.function(operation)
    by_products = backend != "reference" and hasattr(linalg, operation)
    return _function(linalg if by_products else reference, operation)


def _function(module: ModuleType, operation: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module, operation)
    return function
