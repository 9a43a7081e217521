"""Tensors that say they lie on ``cuda:1`` while device 0 is current, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HERE = torch.device("cuda", 1)


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it lies on ``HERE``, as does what is computed from it."""

    device = property(lambda self: HERE)  # type: ignore[assignment]


class _Factories(TorchFunctionMode):
    """What is made on ``HERE`` is made ``Elsewhere``; another CUDA device is an error."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = []

        def on_cpu(value: Any) -> Any:
            if not isinstance(value, torch.device) or value.type != "cuda":
                return value
            assert value == HERE, f"{function} works on {value}"
            asked.append(value)
            return torch.device("cpu")

        args, kwargs = tree_map(on_cpu, (args, kwargs or {}))
        result = function(*args, **kwargs)
        return result.as_subclass(Elsewhere) if asked and isinstance(result, torch.Tensor) else result


class Current:
    """The index of the current device, as ``torch.cuda.device`` sets it."""

    def __init__(self) -> None:
        self.index = 0

    @contextmanager
    def enter(self, device: torch.device) -> Iterator[None]:
        before, self.index = self.index, device.index
        try:
            yield
        finally:
            self.index = before


@contextmanager
def two_devices() -> Iterator[tuple[Current, Callable[[torch.Tensor], torch.Tensor]]]:
    """Inside, there are two devices; yields which is current, and a function that moves a tensor to ``HERE``."""
    current = Current()
    with patch("torch.cuda.device", current.enter), _Factories():
        yield current, lambda tensor: tensor.as_subclass(Elsewhere)
