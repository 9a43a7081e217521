"""The Hessians of a block's layers, collected while it runs: one for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import thanos_kernels as kernels
from thanos.engine.timing import StepTimer
from thanos.walk.decoder import Layer


class InputHessian:
    """``mean(x x.T)`` over the tokens x of one input.

    Attributes:
        first: the name of the first layer that received the input.
        hessian: (b, b), float32, or float64 for float64 inputs.
        tokens: how many it was taken from.
        calls: how many tensors.
    """

    def __init__(self, first: str) -> None:
        self.first = first
        self.hessian: Tensor | None = None
        self.tokens = 0
        self.calls = 0
        self._timed: StepTimer | None = None

    def add(self, inputs: Tensor, backend: str) -> None:
        """Take in ``inputs`` (..., b), in any floating dtype."""
        inputs = inputs.detach().flatten(0, -2)
        if self.hessian is None or self._timed is None:
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            self.hessian = inputs.new_empty((inputs.shape[1], inputs.shape[1]), dtype=dtype)
            self._timed = StepTimer(inputs.device)
        self.tokens += len(inputs)
        self.calls += 1
        with self._timed("hessian"):
            kernels.accumulate_hessian(self.hessian, inputs, len(inputs) / self.tokens, backend=backend)

    def merge(self, other: InputHessian) -> None:
        """Take in what ``other`` saw of the same input, such as the tokens of another process."""
        if other.hessian is None:
            return
        if self.hessian is None:
            self.hessian, self._timed = other.hessian.clone(), StepTimer(other.hessian.device)
        else:
            self.hessian.lerp_(other.hessian, other.tokens / (self.tokens + other.tokens))
        self.tokens += other.tokens
        self.calls += other.calls

    def seconds(self) -> float:
        """Spent on the products; on a device, to be read after a wait for it."""
        return self._timed.seconds().get("hessian", 0.0) if self._timed is not None else 0.0


class Collector:
    """Collects the Hessians of ``layers`` while their block runs.

    Layers that receive the very same tensor share one :class:`InputHessian`; an input is kept no longer than the block
    itself keeps it.

    Args:
        backend: of the operations.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._of_layer: dict[str, InputHessian] = {}
        self._of_input = WeakTensorKeyDictionary()

    def take(self, name: str) -> InputHessian | None:
        """Hand out what was collected for a layer; None where no token reached it."""
        return self._of_layer.pop(name, None)

    @contextmanager
    def watching(self, layers: Sequence[Layer], seen: Callable[[Layer, Tensor], None]) -> Iterator[None]:
        """While the body runs, call ``seen(layer, inputs)`` before each layer that is given at least one token."""

        def watcher(layer: Layer) -> Callable[..., None]:
            def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs = args[0] if args else next(iter(kwargs.values()))
                if inputs.numel():
                    seen(layer, inputs)

            return watch

        with ExitStack() as stack:
            for layer in layers:
                handle = layer.module.register_forward_pre_hook(watcher(layer), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def add(self, layer: Layer, inputs: Tensor) -> None:
        """Take in what a layer is given, unless its Hessian has seen this very tensor already."""
        version, known = self._of_input.get(inputs, (None, None))
        known = known if version == inputs._version else None
        own = self._of_layer.get(layer.name)
        if own is None and known is not None and known.calls == 1:
            self._of_layer[layer.name] = known  # until now both have seen the same
        elif own is None or own is not known:
            own = self._of_layer.setdefault(layer.name, InputHessian(layer.name))
            own.add(inputs, self.backend)
            self._of_input[inputs] = inputs._version, own
