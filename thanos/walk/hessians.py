"""The Hessians of a block's layers, collected while it runs: one for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import thanos_kernels as kernels
from thanos.engine.targets import accumulate_drift
from thanos.engine.timing import StepTimer
from thanos.walk.decoder import Layer
from thanos.walk.dense import DenseInputs
from thanos.walk.experts import run

_ROWS = 256  # of two Hessians that are added at a time


class InputHessian:
    """``mean(x x.T)`` over the tokens x of one input, or their weighted mean.

    Attributes:
        first: the name of the first layer that received the input.
        hessian: (b, b), float32, or float64 for float64 inputs; None before the first token.
        tokens: how many it was taken from.
        calls: how many tensors.
        mass: the sum of the tokens' weights, one each where none are given.
        drift: (b, b), ``mean((x' - x) x.T)``, x' the same tokens' inputs in the dense model; None where unknown.
    """

    def __init__(self, first: str) -> None:
        self.first = first
        self.drift: Tensor | None = None
        self.hessian: Tensor | None = None
        self.tokens = 0
        self.calls = 0
        self.mass = 0.0
        self._timed: StepTimer | None = None

    def add(self, inputs: Tensor, backend: str, scale: Tensor | None = None, dense: Tensor | None = None) -> None:
        """Take in ``inputs`` (..., b), in any floating dtype; with ``scale`` g (n,), ``sum(g^2 x x.T) / sum(g^2)``.

        ``dense`` are the same tokens' inputs in the dense model, without a scale; a part without them ends the drift.
        """
        inputs = inputs.detach().flatten(0, -2)
        mass = float(len(inputs))
        if scale is not None:
            wide = torch.promote_types(inputs.dtype, torch.float32)
            scale = scale.detach().to(wide)
            mass = float(scale.double().square().sum())
            if mass > 0:
                inputs = inputs.to(wide) * (scale * (len(inputs) / mass) ** 0.5)[:, None]
        if not mass:
            return
        if self.hessian is None:
            dtype = torch.promote_types(inputs.dtype, torch.float32)
            self.hessian = inputs.new_empty((inputs.shape[1], inputs.shape[1]), dtype=dtype)
        if self._timed is None:
            self._timed = StepTimer(inputs.device)
        self.tokens += len(inputs)
        self.calls += 1
        self.mass += mass
        with self._timed("hessian"):
            kernels.accumulate_hessian(self.hessian, inputs, mass / self.mass, backend=backend)
            if dense is None or (self.drift is None and self.calls > 1):
                self.drift = None
            else:
                if self.drift is None:
                    self.drift = torch.empty_like(self.hessian)
                accumulate_drift(self.drift, dense.flatten(0, -2), inputs, mass / self.mass)

    def add_halves(self, inputs: Tensor, cut: int, backend: str, dense: Tensor | None = None) -> None:
        """Take in ``inputs`` (..., b) as two processes would: the first ``cut`` rows summed apart from the others.

        What is pruned then has the same bits with one process as with two. It takes another (b, b) for the moment.
        """
        inputs = inputs.detach().flatten(0, -2)
        if not 0 < cut < len(inputs):
            self.add(inputs, backend, None, dense)
            return
        dense = None if dense is None else dense.flatten(0, -2)
        second, calls = InputHessian(self.first), self.calls
        self.add(inputs[:cut], backend, None, None if dense is None else dense[:cut])
        second._timed = self._timed
        second.add(inputs[cut:], backend, None, None if dense is None else dense[cut:])
        self.merge(second)
        self.calls = calls + 1

    def merge(self, other: InputHessian) -> None:
        """Take in what ``other`` saw of the same input, such as the tokens of another process."""
        if other.hessian is None:
            return
        if self.hessian is None:
            self.hessian, self._timed = other.hessian.clone(), StepTimer(other.hessian.device)
            self.drift = None if other.drift is None else other.drift.clone()
        else:
            mass = self.mass + other.mass
            own, others = self.mass / mass, other.mass / mass  # weighed before they are added, as by processes
            if self.drift is None or other.drift is None:
                self.drift = None
            else:
                _add(self.drift, own, other.drift, others)
            _add(self.hessian, own, other.hessian, others)
        self.mass += other.mass
        self.tokens += other.tokens
        self.calls += other.calls

    def blended(self, pool: InputHessian, weight: float) -> InputHessian:
        """``(N H + weight H_pool) / (N + weight)``, N the tokens: a rarely used input leans on what all others see."""
        if pool.hessian is None:
            return self
        result = InputHessian(self.first)
        own = 0.0 if self.hessian is None else self.tokens / (self.tokens + weight)
        result.hessian = pool.hessian if self.hessian is None else torch.lerp(pool.hessian, self.hessian, own)
        result.tokens, result.calls, result.mass, result._timed = self.tokens, self.calls, self.mass, self._timed
        return result

    def of_all(self, hessian: Tensor, tokens: int, mass: float) -> InputHessian:
        """What this process and others saw together."""
        result = InputHessian(self.first)
        result.hessian, result.tokens, result.calls, result.mass = hessian, tokens, self.calls, mass
        result._timed = self._timed
        return result

    def seconds(self) -> float:
        """Spent on the products; on a device, to be read after a wait for it."""
        return self._timed.seconds().get("hessian", 0.0) if self._timed is not None else 0.0


def _add(mean: Tensor, own: float, other: Tensor, others: float) -> None:
    """``own * mean + others * other`` in place, some rows at a time, for the product takes memory of its own."""
    for rows, added in zip(mean.split(_ROWS), other.split(_ROWS), strict=True):
        rows.mul_(own).add_(added * others)


class Collector:
    """Collects the Hessians of ``layers`` while their block runs.

    Layers that receive the very same tensor share one :class:`InputHessian`; an input is kept no longer than the block
    itself keeps it. Experts of one stage share a pool, the Hessian of all tokens that reach the stage.

    Args:
        backend: of the operations.
        everything: whether each expert is shown all tokens, not only those routed to it.
        caught: the inputs of the dense model, from which the drift is taken.
        samples: where all come at once, how many; their halves are summed apart (:meth:`InputHessian.add_halves`).
    """

    def __init__(
        self, backend: str, everything: bool = False, caught: DenseInputs | None = None, samples: int = 1
    ) -> None:
        self.backend = backend
        self._samples = samples
        self._caught = caught
        self._everything = everything
        self._of_layer: dict[str, InputHessian] = {}
        self._of_input = WeakTensorKeyDictionary()
        self._pools: dict[tuple[str, int], InputHessian] = {}

    def take(self, layer: Layer) -> InputHessian | None:
        """Hand out what was collected for a layer; None where nothing was."""
        return self._of_layer.pop(layer.name, None)

    def pool(self, layer: Layer) -> InputHessian | None:
        """What all experts beside this one saw together; None for other layers."""
        return self._pools.get(_stage(layer)) if layer.experts is not None else None

    @contextmanager
    def watching(
        self, layers: Sequence[Layer], seen: Callable[[Layer, Tensor, Tensor | None], None], *, pools: bool = True
    ) -> Iterator[None]:
        """While the body runs, call ``seen(layer, inputs, scale)`` before each layer is used.

        Args:
            seen: for an ordinary layer called only with at least one token; ``scale`` (n,) weighs an expert's tokens.
            pools: whether the pools of experts are collected too.

        Raises:
            ValueError: the body ran, but not the forward of a module with experts among the layers.
        """
        fused: dict[str, list[Layer]] = {}
        with ExitStack() as stack:
            for layer in layers:
                if layer.experts is not None:
                    fused.setdefault(layer.experts.name, []).append(layer)
                else:
                    handle = layer.module.register_forward_pre_hook(_watcher(layer, seen), with_kwargs=True)
                    stack.callback(handle.remove)
            calls = [stack.enter_context(self._experts(group, seen, pools)) for group in fused.values()]
            yield
        for name, count in zip(fused, calls, strict=True):
            if not count:
                raise ValueError(f"{name}: its block runs without calling it; this layout of experts is not supported")

    @contextmanager
    def _experts(
        self, layers: list[Layer], seen: Callable[[Layer, Tensor, Tensor | None], None], pools: bool
    ) -> Iterator[list[int]]:
        experts = layers[0].experts
        assert experts is not None
        of: dict[tuple[int, int], list[Layer]] = {}
        for layer in layers:
            of.setdefault((_stage(layer)[1], layer.expert), []).append(layer)
        calls: list[int] = []

        def pooled(stage: int, parts: list[tuple[Tensor, Tensor | None]]) -> None:
            if pools:
                pool = self._pools.setdefault((experts.name, stage), InputHessian(experts.name))
                for inputs, scale in parts:
                    pool.add(inputs, self.backend, scale)

        def show(stage: int, expert: int, inputs: Tensor, scale: Tensor | None) -> None:
            for layer in of.get((stage, expert), ()):
                seen(layer, inputs, scale)
            if not self._everything:  # no other layer is given this tensor, which lives on until all experts were shown
                self._of_input.pop(inputs, None)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            return run(experts, experts.route(*args, **kwargs), pooled, show, self._everything)

        with replaced_forward(experts.module, forward):
            yield calls

    def add(self, layer: Layer, inputs: Tensor, scale: Tensor | None = None) -> None:
        """Take in what a layer is given, unless its Hessian has seen this very tensor already."""
        version, known = self._of_input.get(inputs, (None, None))
        known = known if version == inputs._version else None
        own = self._of_layer.get(layer.name)
        if own is None and known is not None and known.calls == 1:
            self._of_layer[layer.name] = known  # until now both have seen the same
        elif own is None or own is not known:
            own = self._of_layer.setdefault(layer.name, InputHessian(layer.name))
            dense = self._caught.take(layer, inputs) if self._caught is not None else None
            if scale is None and self._samples > 1:
                rows = inputs.numel() // inputs.shape[-1]
                own.add_halves(inputs, rows * (self._samples // 2) // self._samples, self.backend, dense)
            else:
                own.add(inputs, self.backend, scale, dense)
            self._of_input[inputs] = inputs._version, own


def _watcher(layer: Layer, seen: Callable[[Layer, Tensor, Tensor | None], None]) -> Callable[..., None]:
    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if inputs.numel():
            seen(layer, inputs, None)

    return watch


def _stage(layer: Layer) -> tuple[str, int]:
    assert layer.experts is not None
    stages = layer.experts.stages
    return layer.experts.name, next(i for i, stage in enumerate(stages) if layer.parameter in stage)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While the body runs, calling ``module`` calls ``forward``."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
