"""The dense model beside the pruned one: what its layers are given for the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from thanos.walk.decoder import Layer

ROUTED = "its tokens are routed, and the dense model routes others to it"
UNMATCHED = "its inputs in the dense model are not those of the same tokens"


class DenseInputs:
    """Catches what layers are given in the dense model, until the pruned one comes to the same tokens.

    Only inputs that surely belong to the same tokens are handed out: the layer is called once, with every token.
    """

    def __init__(self) -> None:
        self._caught: dict[str, list[tuple[Tensor, int]]] = {}
        self._tokens = 0

    @contextmanager
    def watching(self, layers: Sequence[Layer], hidden: Tensor) -> Iterator[None]:
        """While the body runs a block on ``hidden`` (n, S, d), keep what its layers, experts aside, are given."""
        self._caught.clear()
        self._tokens = hidden.shape[0] * hidden.shape[1]
        with ExitStack() as stack:
            for layer in layers:
                if layer.experts is None:
                    stack.callback(
                        layer.module.register_forward_pre_hook(self._watcher(layer.name), with_kwargs=True).remove
                    )
            yield

    def take(self, layer: Layer, inputs: Tensor) -> Tensor | None:
        """The dense model's inputs, of the shape of ``inputs``; None where they cannot be matched to its tokens."""
        found = self._caught.pop(layer.name, [])
        if len(found) != 1 or inputs.numel() != self._tokens * inputs.shape[-1]:
            return None
        dense, version = found[0]
        return dense if dense.shape == inputs.shape and dense._version == version else None

    def clear(self) -> None:
        """Forget what was not taken."""
        self._caught.clear()

    def _watcher(self, name: str) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._caught.setdefault(name, []).append((inputs.detach(), inputs._version))

        return watch
