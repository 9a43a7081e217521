"""What operations take, and what they may write into."""

from __future__ import annotations

import torch
from torch import Tensor

WORKING = (torch.float32, torch.float64)
INPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, int | None]) -> None:
    """Refuse anything but a dense matrix of these dtypes; None in ``shape`` takes any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {names}, not {str(tensor.dtype).removeprefix('torch.')}")
    fits = tensor.dim() == 2 and all(want in (None, have) for want, have in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {wanted}, not {' x '.join(map(str, tensor.shape)) or 'scalar'}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be dense, not {tensor.layout}; pass its .to_dense()")


def square(name: str, tensor: Tensor) -> None:
    matrix(name, tensor, WORKING, (None, None))
    matrix(name, tensor, WORKING, (None, len(tensor)))


def whole_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """A mask (c, B) whose bytes are 0 and 1; a view of other bytes as bool may hold any, and kernels read bytes."""
    matrix("mask", mask, (torch.bool,), shape)
    return mask.view(torch.uint8).bool()


def check_norms(norms: Tensor, weights: Tensor) -> None:
    if norms.dtype != weights.dtype or norms.shape != weights.shape[1:]:
        raise ValueError(
            f"norms must hold one {weights.dtype} for each of the {weights.shape[1]} columns, "
            f"not {norms.dtype} of shape {tuple(norms.shape)}"
        )


def check_n_of_m(n: int, m: int, columns: int) -> None:
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n:m must have 0 <= n <= m and m >= 1, not {n}:{m}")
    if columns % m:
        raise ValueError(f"groups of {m} do not divide {columns} columns")


def output(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """The caller's output, checked, or a new one."""
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be a {dtype} tensor of shape {tuple(shape)} on {like.device}, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; pass a new tensor or its .contiguous()")
    return tensor
