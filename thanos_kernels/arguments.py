"""What operations may write into."""

from __future__ import annotations

import torch
from torch import Tensor


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
