"""Replay a model's decoder blocks one by one.

How they are called is learnt by running the model: every block's ``forward`` is replaced by a recorder that hands its
hidden states on, so each block's own masks and rotary tables are captured, and neither blocks nor output head run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from thanos.walk.decoder import Decoder
from thanos.walk.hessians import replaced_forward

_PROBE_TOKENS = 16
_COMPARED = 8  # of the tensors alike that are kept
_HIDDEN = object()  # stands for the hidden states in captured arguments


@dataclass(frozen=True)
class Call:
    """How one block is called on one batch: its arguments, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states for ``hidden`` (batch, length, width), on the device of ``hidden``."""

        def place(value: Any) -> Any:
            if value is _HIDDEN:
                return hidden
            return value.to(hidden.device) if isinstance(value, Tensor) else value

        return hidden_states(block(*tree_map(place, self.args), **tree_map(place, self.kwargs)), hidden.shape)


def hidden_states(output: Any, shape: Sequence[int]) -> Tensor:
    """The hidden states in a block's output: the tensor itself, or the first of that shape in a tuple."""
    values = output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == tuple(shape):
            return value
    raise ValueError("this model's blocks do not return hidden states of the shape they are given; it is not supported")


class _Stopped(Exception):  # noqa: N818
    """Ends a forward once the last block has been called."""


class Capture:
    """Runs a model up to its blocks, to record how each of them is called.

    Args:
        model: in evaluation mode.
        decoder: its blocks.
        samples: (N, S), token ids; a short piece of the first is used to learn in which order the blocks run and what
            they return, and to check that calling them one after the other gives what the model itself computes.
        running: within its body, the model and its blocks can run; they can all the time if they are in memory.

    Attributes:
        decoder: the blocks that run, in their order.

    Raises:
        ValueError: the blocks are no simple chain, so they cannot be replayed one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        samples: Tensor,
        running: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._kept: dict[Any, list[Tensor]] = {}
        tokens = samples[:1, :_PROBE_TOKENS]
        with running():
            order, outputs, shape = _watch(model, decoder.blocks, tokens)
        parts = decoder.blocks, decoder.layers, decoder.skipped
        self.decoder = Decoder(*([part[i] for i in order] for part in parts))  # type: ignore[arg-type]
        self._templates = [_template(output, shape) for output in outputs]
        hidden, calls = self(tokens)
        with running():
            for call, block in zip(calls, self.decoder.blocks, strict=True):
                hidden = call(block, hidden)
        expected = hidden_states(outputs[-1], shape)
        if not torch.allclose(hidden.float(), expected.float(), rtol=0.02, atol=1e-3, equal_nan=True):
            raise _no_chain(model)
        self._kept.clear()

    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The first block's hidden states for ``tokens`` (batch, length), and every block's call.

        Equal tensors among the calls, of this batch and of earlier ones, are kept once.
        """
        calls: list[Call] = []
        first: list[Tensor] = []
        same: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in same:  # the entry holds the tensor, so that its id stays its own
                same[id(value)] = value, self._keep_once(value)
            return same[id(value)][1]

        def recorder(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                place, hidden = _find_hidden(self._model, args, kwargs, first[0].shape if first else tokens.shape)
                if not first:
                    first.append(hidden)
                given = [_HIDDEN if key == place else tree_map(keep, value) for key, value in enumerate(args)]
                named = {key: _HIDDEN if key == place else tree_map(keep, value) for key, value in kwargs.items()}
                calls.append(Call(tuple(given), named))
                if index == len(self.decoder.blocks) - 1:
                    raise _Stopped
                return tree_map(lambda value: hidden if value is _HIDDEN else value, self._templates[index])

            return record

        with ExitStack() as stack:
            for index, block in enumerate(self.decoder.blocks):
                stack.enter_context(replaced_forward(block, recorder(index)))
            with suppress(_Stopped):
                run_model(_without_head(self._model), tokens)
        return first[0], calls

    def finish(self, tokens: Tensor, hidden: Tensor) -> Any:
        """The model's output for ``tokens`` (batch, length), where the last block gives ``hidden``; no block runs."""

        def giver(index: int) -> Callable[..., Any]:
            filled = tree_map(lambda value: hidden if value is _HIDDEN else value, self._templates[index])
            return lambda *_, **__: filled

        with ExitStack() as stack:
            for index, block in enumerate(self.decoder.blocks):
                stack.enter_context(replaced_forward(block, giver(index)))
            return run_model(self._model, tokens)

    def _keep_once(self, tensor: Tensor) -> Tensor:
        alike = self._kept.setdefault((tensor.shape, tensor.stride(), tensor.dtype, tensor.device), [])
        for other in alike[-_COMPARED:]:
            if torch.equal(tensor, other):
                return other
        alike.append(tensor)
        return tensor


def run_model(model: nn.Module, tokens: Tensor, *, last: int = 0) -> Any:
    """The output of the model for ``tokens`` (batch, length), computed without a cache, on the model's device.

    Where the model can, it computes the logits of the ``last`` positions only; 0 means all.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": last}
    known = inspect.signature(model.forward).parameters
    options = {name: value for name, value in wanted.items() if name in known}
    return model(input_ids=tokens.to(embedding.weight.device), **options)


def _without_head(model: nn.Module) -> nn.Module:
    body = getattr(model, "base_model", model)
    assert isinstance(body, nn.Module)
    return body


def _no_chain(model: nn.Module) -> ValueError:
    return ValueError(
        f"the blocks of {type(model).__name__} pass each other more than one tensor of hidden states; "
        "this architecture is not supported"
    )


def _watch(model: nn.Module, blocks: list[nn.Module], tokens: Tensor) -> tuple[list[int], list[Any], torch.Size]:
    """The order in which the blocks run, what each returns, and the shape of their hidden states."""
    order: list[int] = []
    outputs: list[Any] = []
    shapes: list[torch.Size] = []

    def watcher(index: int) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            order.append(index)
            outputs.append(output)
            shapes.append(_find_hidden(model, args, kwargs, tokens.shape)[1].shape)

        return watch

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watcher(index), with_kwargs=True).remove)
        run_model(_without_head(model), tokens)
    if not order or len(set(order)) < len(order) or len(set(shapes)) > 1:
        raise _no_chain(model)
    return order, outputs, shapes[0]


def _find_hidden(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Sequence[int]
) -> tuple[int | str, Tensor]:
    """Where in a block's arguments the hidden states are: the first (batch, length, width) of floats."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 3:
            continue
        if value.shape[: len(shape)] == tuple(shape):
            return place, value
    raise _no_chain(model)


def _template(output: Any, shape: Sequence[int]) -> Any:
    """The structure of a block's output, to be filled with other hidden states; None for what else it holds."""
    hidden = hidden_states(output, shape)
    if isinstance(output, Tensor):
        return _HIDDEN
    return type(output)(_HIDDEN if value is hidden else None for value in output)
