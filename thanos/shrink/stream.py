"""The samples on their way through the blocks: each block sees what those before it, already cut, make of them.

The blocks keep their shape while the walk lasts. A removed channel or head is a set of zero columns in the layer that
reads it, which computes the same; the parameters are cut when all is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.walk.clock import Clock
from thanos.walk.replay import Call


@dataclass
class Batch:
    """Samples that go through a block together: their hidden states (n, S, d) and how each block is called."""

    hidden: Tensor
    calls: list[Call]


@dataclass
class Inputs:
    """What is known of the input x of a site after a forward of its block over all samples.

    Attributes:
        hessian: (b, b), ``mean(x x.T)``, float32; each token weighted, the weights of mean one, where the stream is
            ``relative``.
        error: (c, b), ``mean(e x.T)`` with e what the block's output lacks to that of the dense model; None without it.
        absolute: (b,), ``mean(abs(x))``.
        tokens: how many.
        weight: the sum of their weights.
    """

    hessian: Tensor
    absolute: Tensor
    error: Tensor | None = None
    tokens: int = 0
    weight: float = 0.0


@dataclass
class Stream:
    """The samples on their way through the blocks.

    Attributes:
        batches: what the cut model makes of them.
        relative: weight each token by ``1 / |y|^2``, y the block's output: a norm follows, so an error counts by
            its share of y. Some tokens (the first, above all) are a hundred times longer than the others.
        dense: the hidden states of the dense model, one a batch; None where nobody asks for them.
        corrected: whether the inputs of a layer are compared with what its block's output lacks to the dense model's.
        passed: of each batch the inputs of a layer and the block's output with the weight that the layer then had,
            where that is enough to know the block's output with another one.
    """

    batches: list[Batch]
    clock: Clock
    relative: bool = True
    dense: list[Tensor] | None = None
    corrected: bool = False
    wanted: list[Tensor] = field(default_factory=list)
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def enter(self, block: nn.Module, index: int) -> None:
        """A block's turn, still as it was: compute what the dense model makes of the samples."""
        if self.dense is None:
            return
        with self.clock("forward"):
            self.wanted = [
                batch.calls[index](block, hidden) for batch, hidden in zip(self.batches, self.dense, strict=True)
            ]

    def collect(self, block: nn.Module, index: int, sink: nn.Module, backend: str, keep: bool = False) -> Inputs:
        """Run a block as it is and take down the inputs of its layer ``sink``; the samples stay in front of it.

        Args:
            keep: the layer's output is added to the block's: remember both, so that :meth:`go_on` need not run it.

        Raises:
            ValueError: the block's output is not finite; to follow the layer's name.
        """
        found: Inputs | None = None
        for number, batch in enumerate(self.batches):
            with self.clock("forward"), input_of(sink) as kept:
                output = batch.calls[index](block, batch.hidden)
            with self.clock("hessian"):
                (inputs,) = kept
                if keep:
                    self.passed.append((inputs, output))
                inputs = inputs.flatten(0, -2)
                found = found or _empty(inputs)
                found.tokens += len(inputs)
                scale = _token_scales(output) if self.relative else inputs.new_ones(len(inputs), dtype=torch.float32)
                weight = float(scale.square().sum())
                if not math.isfinite(weight):
                    raise ValueError("its block's output holds NaN or infinity")
                found.weight += weight
                share = weight / found.weight
                scale *= (len(inputs) / weight) ** 0.5
                scaled = inputs * scale[:, None].to(inputs.dtype)
                kernels.accumulate_hessian(found.hessian, scaled, share, backend=backend)
                found.absolute.lerp_(scaled.abs().mean(0, dtype=torch.float32), share)
                if self.corrected:
                    lacks = (self.wanted[number] - output).flatten(0, -2).float() * scale[:, None]
                    product = lacks.T @ scaled.float() / len(inputs)
                    found.error = product if found.error is None else found.error.lerp_(product, share)
        assert found is not None
        return found

    def leave(self, block: nn.Module, index: int) -> None:
        """The block is cut: on to the next."""
        with self.clock("forward"):
            for batch in self.batches:
                batch.hidden = batch.calls[index](block, batch.hidden)
        self._follow()

    def go_on(self, change: Tensor, adds: float) -> None:
        """As :meth:`leave`, where the last inputs that were collected were kept: the block does not run again.

        Args:
            change: (c, b), of the layer's weight since.
            adds: the multiple of the layer's output that the block's holds.
        """
        with self.clock("forward"):
            for batch, (inputs, output) in zip(self.batches, self.passed, strict=True):
                step = nn.functional.linear(inputs, (adds * change).to(inputs.dtype))
                batch.hidden = output + step.view_as(output)
        self.passed = []
        self._follow()

    def _follow(self) -> None:
        if self.dense is not None:
            self.dense, self.wanted = self.wanted, []


def _token_scales(output: Tensor) -> Tensor:
    """(tokens,), float32: ``1 / |y|`` of a block's outputs y (..., width)."""
    norms = output.flatten(0, -2).float().norm(dim=1)
    return 1 / norms.clamp(min=1e-6 * float(norms.mean()) + 1e-30)


def _empty(inputs: Tensor) -> Inputs:
    width = inputs.shape[1]
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    return Inputs(inputs.new_zeros((width, width), dtype=dtype), inputs.new_zeros(width, dtype=torch.float32))


@contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the body, what the module is given, one call after the other."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append((args[0] if args else next(iter(kwargs.values()))).detach())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        handle.remove()
