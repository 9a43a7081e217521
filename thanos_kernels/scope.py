"""Arithmetic that does not depend on what the caller has switched on: gradients, autocast, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def plain_arithmetic(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run ``function`` without recording gradients, and in the dtypes that it names rather than those of autocast.

    Nothing here has a backward, and a product that autocast rounds to bfloat16 is not what an operation promises.
    """

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.no_grad():
            if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
                return function(*args, **kwargs)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*args, **kwargs)

    return run


def writing(*tensors: Tensor | None) -> AbstractContextManager[object]:
    """A context in which ``tensors`` may be written to: those made in inference mode only take it there."""
    made_there = any(tensor is not None and tensor.is_inference() for tensor in tensors)
    return torch.inference_mode() if made_there else nullcontext()
