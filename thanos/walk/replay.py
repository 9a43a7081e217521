"""Replay a model's decoder blocks one by one.

How they are called is learnt by running the model: every block's ``forward`` is replaced by a recorder that hands its
hidden states on, so each block's own masks and rotary tables are captured, and neither blocks nor output head run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from thanos.walk.decoder import Decoder, Layer
from thanos.walk.hessians import replaced_forward
from thanos_kernels.errors import first_line

_PROBE_TOKENS = 16
_COMPARED = 8  # of the tensors alike that are kept
_HIDDEN = object()  # stands for the hidden states in captured arguments


@dataclass(frozen=True)
class Call:
    """How one block is called on one batch: its arguments, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for ``hidden`` (batch, length, width), on the device of ``hidden``."""

        def place(value: Any) -> Any:
            if value is _HIDDEN:
                return hidden
            if isinstance(value, _Board):
                return value.notes
            return value.to(hidden.device) if isinstance(value, Tensor) else value

        return hidden_states(block(*tree_map(place, self.args), **tree_map(place, self.kwargs)), hidden.shape)


def hidden_states(output: Any, shape: Sequence[int]) -> Tensor:
    """The hidden states in a block's output: the tensor itself, or the first of that shape in a tuple."""
    values = output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == tuple(shape):
            return value
    raise ValueError("this model's blocks do not return hidden states of the shape they are given; it is not supported")


@dataclass(frozen=True, eq=False)
class _Board:
    """A dictionary, empty at first, in which blocks leave each other notes, such as keys and values to share."""

    notes: dict[Any, Any]


def _is_board(value: Any) -> bool:
    return isinstance(value, dict) and not value


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
        bypassed: the names of layers whose weight is used without calling them.
        together: for each layer by name, those that are given the very same tensor, itself among them.

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
        layers = [layer for block in decoder.layers for layer in block if layer.experts is None]
        with _called(layers) as (called, self.together), running():
            try:
                runs = watch_blocks(model, decoder.blocks, tokens)
            except RuntimeError as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(
                    f"{type(model).__name__} does not run on the samples, before anything is pruned ({reason})"
                ) from error
        with running():
            self.bypassed = _bypassed(model, [layer for layer in layers if layer.name not in called], tokens)
        parts = decoder.blocks, decoder.layers, decoder.skipped
        self.decoder = Decoder(*([part[run.index] for run in runs] for part in parts))  # type: ignore[arg-type]
        self._places = [run.place for run in runs]
        self._templates = [_template(run.output, run.shape) for run in runs]
        try:
            hidden, calls = self(tokens)
            with running():
                for call, block in zip(calls, self.decoder.blocks, strict=True):
                    hidden = call(block, hidden)
        except Exception as error:
            raise _no_chain(model, f"cannot be run one by one ({type(error).__name__}: {first_line(error)})") from error
        expected = hidden_states(runs[-1].output, runs[-1].shape)
        if not torch.allclose(hidden.float(), expected.float(), rtol=0.02, atol=1e-3, equal_nan=True):
            raise _no_chain(
                model, "pass each other more than one tensor of hidden states, or it is changed between them"
            )
        self._kept.clear()

    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The first block's hidden states for ``tokens`` (batch, length), and every block's call.

        Equal tensors among the calls, of this batch and of earlier ones, are kept once.
        """
        calls: list[Call] = []
        first: list[Tensor] = []
        same: dict[int, tuple[Tensor, Tensor]] = {}
        boards: dict[int, _Board] = {}

        def keep(value: Any) -> Any:
            if _is_board(value):
                return boards.setdefault(id(value), _Board(value))
            if not isinstance(value, Tensor):
                return value
            if id(value) not in same:  # the entry holds the tensor, so that its id stays its own
                same[id(value)] = value, self._keep_once(value)
            return same[id(value)][1]

        def kept(value: Any) -> Any:
            return tree_map(keep, value, is_leaf=_is_board)

        def recorder(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                place = self._places[index]
                hidden = args[place] if isinstance(place, int) else kwargs[place]
                if not first:
                    first.append(hidden)
                given = [_HIDDEN if key == place else kept(value) for key, value in enumerate(args)]
                named = {key: _HIDDEN if key == place else kept(value) for key, value in kwargs.items()}
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

    Raises:
        NoChainError: the model asks for more than tokens, such as an image.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": last}
    known = inspect.signature(model.forward).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [name for name, one in known.items() if one.default is one.empty and one.kind in named]
    if more := [name for name in needed if name != "input_ids"]:
        raise NoChainError(f"{type(model).__name__} does not run on text alone: it asks for {', '.join(more)} too")
    options = {name: value for name, value in wanted.items() if name in known}
    return model(input_ids=tokens.to(embedding.weight.device), **options)


def _without_head(model: nn.Module) -> nn.Module:
    body = getattr(model, "base_model", model)
    assert isinstance(body, nn.Module)
    try:
        body.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # of what wraps the decoder of Bart and its kin, which cannot run by itself
        return model
    return body


def _no_chain(model: nn.Module, what: str) -> NoChainError:
    return NoChainError(f"the blocks of {type(model).__name__} {what}; this architecture is not supported")


class NoChainError(ValueError):
    """The blocks of a model do not run one after the other, each on what the one before it returns."""


@dataclass(frozen=True)
class BlockRun:
    """One block, run by its model.

    Attributes:
        index: of the block in the list that was given.
        place: where its hidden states stand among its arguments: a position or a name.
        shape: of its hidden states.
        output: what it returned.
    """

    index: int
    place: int | str
    shape: torch.Size
    output: Any


def watch_blocks(model: nn.Module, blocks: list[nn.Module], tokens: Tensor) -> list[BlockRun]:
    """Run the model on ``tokens`` (batch, length), and see how its blocks run, in their order.

    Raises:
        NoChainError: a block runs more than once, none runs, or they do not return what they are given.
    """
    runs: list[BlockRun] = []

    def watcher(index: int) -> Callable[..., None]:
        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if any(run.index == index for run in runs):
                raise _no_chain(model, f"run more than once for a token, for instance block {index}")
            place, shape = _find_hidden(model, args, kwargs, output)
            runs.append(BlockRun(index, place, shape, output))

        return watch

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watcher(index), with_kwargs=True).remove)
        run_model(_without_head(model), tokens)
    if not runs:
        raise _no_chain(model, "do not run when the model does")
    if len({run.shape for run in runs}) > 1:
        shapes = " and ".join(" x ".join(map(str, shape)) for shape in dict.fromkeys(run.shape for run in runs))
        raise _no_chain(model, f"pass hidden states of different shapes ({shapes})")
    return runs


def _find_hidden(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[int | str, torch.Size]:
    """Where in a block's arguments the hidden states are: the first of floats with the shape of something returned."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for returned in output if isinstance(output, tuple | list) else (output,):
        if not isinstance(returned, Tensor) or not returned.is_floating_point() or returned.dim() < 3:
            continue
        for place, value in places:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == returned.shape:
                return place, value.shape
    raise _no_chain(model, "do not return hidden states of the shape that they are given")


def _template(output: Any, shape: Sequence[int]) -> Any:
    """The structure of a block's output, to be filled with other hidden states; None for what else it holds."""
    hidden = hidden_states(output, shape)
    if isinstance(output, Tensor):
        return _HIDDEN
    return type(output)(_HIDDEN if value is hidden else None for value in output)


class _Uses(TorchFunctionMode):
    """Within its body, notes which of some tensors a function is given.

    Attributes:
        used: their identities.
    """

    def __init__(self, tensors: set[int]) -> None:
        super().__init__()
        self._tensors = tensors
        self.used: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used |= {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} & self._tensors
        return func(*args, **(kwargs or {}))


@contextmanager
def _called(layers: Sequence[Layer]) -> Iterator[tuple[set[str], dict[str, list[Layer]]]]:
    """The names of the layers that were called while the body ran, and for each those that were given the same."""
    called: set[str] = set()
    together: dict[str, list[Layer]] = {}
    of_input = WeakTensorKeyDictionary()

    def note(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if layer.name not in called:
            together[layer.name] = of_input.setdefault(inputs, [])
            together[layer.name].append(layer)
        called.add(layer.name)

    with ExitStack() as stack:
        for layer in layers:
            hook = layer.module.register_forward_pre_hook(
                lambda _, args, kwargs, layer=layer: note(layer, args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield called, together


def _bypassed(model: nn.Module, layers: Sequence[Layer], tokens: Tensor) -> set[str]:
    """Which of the layers, none of them called, have a weight that the model uses all the same; by name."""
    if not layers:
        return set()
    weights = {id(layer.module.weight): layer.name for layer in layers}
    with _Uses(set(weights)) as mode:
        run_model(_without_head(model), tokens)
    return {weights[used] for used in mode.used}
