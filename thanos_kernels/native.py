"""The C++ backend for CPU tensors: ``csrc/`` behind the interface of ``reference.py``.

The environment variable THANOS_ISA (amx, avx512bf16, avx512, avx2 or portable) forces an instruction set below the
best; THANOS_NO_EXTENSION=1 does without the extension.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thanos_kernels import extension

if TYPE_CHECKING:
    from thanos_kernels import _C as _C

    ABSENCE: str
else:
    _C, ABSENCE = extension.load()
if _C is not None and os.environ.get("THANOS_ISA"):
    _C.use_isa(os.environ["THANOS_ISA"])

_INPUT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/hessian.cpp numbers them


def available() -> bool:
    """Whether the extension is there, and built from these sources for this Python; ABSENCE says why not."""
    return _C is not None


def ready(tensor: Tensor) -> bool:
    """Whether the extension can work where this tensor is; if only its absence is in the way, that is said."""
    if tensor.device.type == "cpu" and _C is None and not torch.compiler.is_compiling():
        _say_absence()
    return tensor.device.type == "cpu" and _C is not None


@cache  # once a process
def _say_absence() -> None:
    if not extension.unwanted():
        warnings.warn(
            f"{ABSENCE}, so everything on the CPU runs in plain PyTorch, many times slower; {extension.REMEDY}. "
            "THANOS_NO_EXTENSION=1 in the environment silences this",
            RuntimeWarning,
            stacklevel=3,
        )


def multiplies_bfloat16() -> bool:
    """Whether the instruction set in use has units for products of bfloat16."""
    return _C is not None and _C.isa() in ("amx", "avx512bf16")


def takes(operation: str, *tensors: Tensor) -> bool:
    """Whether ``operation`` has a kernel for these CPU tensors: float32 throughout, 16-bit activations aside."""
    return operation in globals() and tensors[0].dtype == torch.float32


def require(operation: str, *tensors: Tensor) -> None:
    """Refuse what the native backend cannot run, with the reason."""
    if not available():
        raise RuntimeError(f"backend='native' needs the C++ extension, but {ABSENCE}; {extension.REMEDY}")
    if tensors[0].device.type != "cpu":
        raise ValueError(f"backend='native' runs on CPU tensors, not on {tensors[0].device}")
    if tensors[0].dtype != torch.float32:
        raise TypeError(f"{operation}: backend='native' takes float32, not {tensors[0].dtype}; use backend='reference'")


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, whatever lies between them."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def row_solve(gram: Tensor, weights: Tensor, mask: Tensor, out: Tensor, info: Tensor) -> None:
    """As ``reference.row_solve``, sixteen rows at a time."""
    gram, weights, mask = _rows(gram), _rows(weights), _rows(mask)
    _C.row_solve(
        gram.data_ptr(),
        gram.stride(0),
        weights.data_ptr(),
        weights.stride(0),
        mask.data_ptr(),
        mask.stride(0),
        out.data_ptr(),
        info.data_ptr(),
        len(weights),
        weights.shape[1],
        torch.get_num_threads(),
    )


def select_smallest(weights: Tensor, norms: Tensor, count: int | Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As ``reference.select_smallest``, in about one pass over the weights."""
    weights, norms, count = _rows(weights), norms.contiguous(), int(count)
    if not 0 <= count <= weights.numel():
        raise ValueError(f"count must be from 0 to {weights.numel()}, not {count}")
    mask = torch.empty((len(weights), width), dtype=torch.bool, device="cpu")
    taken = torch.empty((), dtype=torch.int64, device="cpu")
    _C.select_smallest(
        weights.data_ptr(),
        weights.stride(0),
        norms.data_ptr(),
        len(weights),
        weights.shape[1],
        count,
        width,
        mask.data_ptr(),
        taken.data_ptr(),
        torch.get_num_threads(),
    )
    return mask, taken


def count_scores(weights: Tensor, norms: Tensor, prefix: Tensor, shift: int, bits: int) -> Tensor:
    """As ``reference.count_scores``."""
    weights, norms = _rows(weights), norms.contiguous()
    counts = torch.empty(1 << bits, dtype=torch.int64, device="cpu")
    _C.count_scores(
        weights.data_ptr(),
        weights.stride(0),
        norms.data_ptr(),
        len(weights),
        weights.shape[1],
        int(prefix),
        shift,
        bits,
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    return counts


def select_below(weights: Tensor, norms: Tensor, threshold: Tensor, ties: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As ``reference.select_below``."""
    weights, norms = _rows(weights), norms.contiguous()
    mask = torch.empty((len(weights), width), dtype=torch.bool, device="cpu")
    taken = torch.empty((), dtype=torch.int64, device="cpu")
    _C.select_below(
        weights.data_ptr(),
        weights.stride(0),
        norms.data_ptr(),
        len(weights),
        weights.shape[1],
        int(threshold),
        int(ties),
        width,
        mask.data_ptr(),
        taken.data_ptr(),
        torch.get_num_threads(),
    )
    return mask, taken


def select_per_row(weights: Tensor, norms: Tensor, count: int) -> Tensor:
    """As ``reference.select_per_row``, without a sort."""
    weights, norms = _rows(weights), norms.contiguous()
    mask = torch.empty(weights.shape, dtype=torch.bool, device="cpu")
    if mask.numel():
        _C.select_per_row(
            weights.data_ptr(),
            weights.stride(0),
            norms.data_ptr(),
            len(weights),
            weights.shape[1],
            count,
            mask.data_ptr(),
            torch.get_num_threads(),
        )
    return mask


def select_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """As ``reference.select_n_of_m``, without a sort."""
    scores = _rows(scores)
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    if mask.numel():
        rows, columns = scores.shape
        _C.select_n_of_m(
            scores.data_ptr(), scores.stride(0), rows, columns, n, m, mask.data_ptr(), torch.get_num_threads()
        )
    return mask


def column_sweep(factor: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """As ``reference.column_sweep``, rows in lanes."""
    factor, weights, mask = _rows(factor), _rows(weights), _rows(mask)
    errors = torch.empty(weights.shape, dtype=torch.float32, device="cpu")
    if errors.numel():
        _C.column_sweep(
            factor.data_ptr(),
            factor.stride(0),
            weights.data_ptr(),
            weights.stride(0),
            mask.data_ptr(),
            mask.stride(0),
            errors.data_ptr(),
            len(weights),
            weights.shape[1],
            torch.get_num_threads(),
        )
    return errors


def column_sweep_n_of_m(factor: Tensor, weights: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As ``reference.column_sweep_n_of_m``, rows in lanes."""
    factor, weights = _rows(factor), _rows(weights)
    errors = torch.empty(weights.shape, dtype=torch.float32, device="cpu")
    mask = torch.empty(weights.shape, dtype=torch.bool, device="cpu")
    if errors.numel():
        _C.column_sweep_n_of_m(
            factor.data_ptr(),
            factor.stride(0),
            weights.data_ptr(),
            weights.stride(0),
            n,
            m,
            errors.data_ptr(),
            mask.data_ptr(),
            len(weights),
            weights.shape[1],
            torch.get_num_threads(),
        )
    return errors, mask


def accumulate_hessian(hessian: Tensor, inputs: Tensor, weight: float) -> None:
    """As ``reference.accumulate_hessian``, computing one triangle; bfloat16 by its own units where there are some."""
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    inputs = _rows(inputs)
    _C.accumulate_hessian(
        hessian.data_ptr(),
        len(hessian),
        inputs.data_ptr(),
        inputs.stride(0),
        len(inputs),
        _INPUT_KINDS[inputs.dtype],
        1 - weight,
        weight / len(inputs),
        torch.get_num_threads(),
    )
