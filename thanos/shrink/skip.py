"""Run a model without some of its decoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from thanos.walk.replay import run_model


class Chain:
    """A model's blocks, and what each of them returns.

    Args:
        model: in evaluation mode.
        blocks: in the order in which they run.
        tokens: (1, S), token ids: a short forward of these shows what the blocks return.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor) -> None:
        self.model, self.blocks = model, list(blocks)
        self._more: dict[int, int] = {}  # of a block's number: what it returns beside the hidden states

        def watcher(index: int) -> Callable[..., None]:
            def watch(_: nn.Module, __: Any, output: Any) -> None:
                self._more[index] = len(output) - 1 if isinstance(output, tuple | list) else -1

            return watch

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(watcher(index)).remove)
            run_model(model, tokens)

    def logits(self, tokens: Tensor, removed: Sequence[int] = ()) -> Tensor:
        """(batch, S, V), without the ``removed`` blocks."""
        with self.passed_over(removed):
            return run_model(self.model, tokens).logits

    @contextmanager
    def passed_over(self, removed: Sequence[int]) -> Iterator[None]:
        """Within the body, these blocks hand their hidden states on as they are."""
        with ExitStack() as stack:
            for index in removed:
                stack.enter_context(self._replaced(index, lambda hidden: hidden))
            yield

    def returns_more(self, index: int) -> int:
        """How many values a block returns in a tuple beside the hidden states; -1 where it returns these alone."""
        return self._more.get(index, -1)

    @contextmanager
    def _replaced(self, index: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        more, block = self._more.get(index, -1), self.blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = change(hidden_argument(args, kwargs))
            return hidden if more < 0 else (hidden, *[None] * more)

        own = block.__dict__.get("forward")
        block.__dict__["forward"] = forward
        try:
            yield
        finally:
            del block.__dict__["forward"]
            if own is not None:
                block.__dict__["forward"] = own


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first (batch, length, width) of floats."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value
    raise ValueError("a block of this model is given no hidden states of the kind that could be passed on")
