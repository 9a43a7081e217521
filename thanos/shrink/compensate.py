"""Adjust the experts that stay to what those that went had done, where tokens that did not decide agree.

A token of an expert that went is sent to others, or to fewer. What its mixture's output then lacks is a linear function
of the down projections that stay: with z the inner state of an expert times the router's weight, and r what the output
lacks, the update of its projection is ``mean(r z.T) inverse(mean(z z.T) + l I)``. Experts share a token, so the updates
of all are taken together, whole or in part, as lowers the error on samples that are held out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos.options import WalkOptions
from thanos.pattern import Unstructured
from thanos.shrink.stream import input_of
from thanos.walk.clock import Clock
from thanos.walk.decoder import find_decoder
from thanos.walk.experts import FusedExperts, adapt
from thanos.walk.memory import available_memory
from thanos.walk.plan import make_plan, work_device

HELD_OUT = 8  # one sample of so many judges
_DAMPINGS = (0.1, 1.0)  # relative to the mean of the diagonal
_SHARES = (1.0, 0.5, 0.25)  # of the update
_TOKENS = 4096  # that go through a mixture at a time
_MEMORY_SHARE = 0.25  # of what is free goes to the experts' products


@dataclass(frozen=True)
class Compensated:
    """What compensation did to a mixture.

    Attributes:
        name: of the module that holds the experts.
        before, after: the squared error of the mixture's output on the samples held out, relative to the output's own;
            equal where the experts stayed as they were.
    """

    name: str
    before: float
    after: float


def compensate(
    model: nn.Module, smaller: Any, names: Sequence[str], samples: Tensor, device: Any = None
) -> list[Compensated]:
    """Update the down projections of the experts of ``smaller``, in the order in which they run.

    Args:
        model: with all experts; its mixtures say what an output should be.
        smaller: the same with fewer; changed in place.
        names: of the modules that hold fused experts, the same in both.
        samples: (N, S), token ids. With fewer than two nothing is held out, and nothing is done.
        device: where blocks are worked on.

    Returns:
        What became of each mixture whose experts have a known layout and that is given (batch, length, width).
    """
    decoder, options = find_decoder(smaller), WalkOptions(Unstructured(0.0), passes=2, device=device)
    known = {name: own for name in names if (own := _fused(smaller, name)) is not None}
    if len(samples) < 2 or not known:
        return []
    inside = dict(smaller.named_modules())
    plan, hidden = make_plan(smaller, decoder, samples, options, Clock(work_device(decoder, options)))
    found: list[Compensated] = []
    for turn in range(len(plan.store)):
        block = plan.store.load(turn, plan.device)
        inside_block = {id(module) for module in block.modules()}
        for name, experts in known.items():
            if id(experts.module) not in inside_block:
                continue
            holder = name.rpartition(".")[0]
            with input_of(inside[holder]) as inputs:
                for batch, states in enumerate(hidden):
                    plan.calls[batch][turn](block, states)
            if any(one.dim() != 3 for one in inputs):
                continue  # the samples are not told apart any more
            pair = _Pair(model.get_submodule(holder), inside[holder], experts)
            found.append(_update(pair, torch.cat(inputs), name))
        hidden = [plan.calls[batch][turn](block, states) for batch, states in enumerate(hidden)]
        plan.store.store(turn)
    return found


def _fused(model: nn.Module, name: str) -> FusedExperts | None:
    experts = adapt(name, model.get_submodule(name))
    return experts if isinstance(experts, FusedExperts) else None


@dataclass(frozen=True)
class _Pair:
    """A mixture with all its experts, the same with fewer, and the adapter of the latter's."""

    dense: nn.Module
    smaller: nn.Module
    experts: FusedExperts

    def lacks(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, d), float32: what the smaller mixture's output lacks, and the output it should be."""
        home = next(self.dense.parameters()).device
        wanted = _output(self.dense(states.to(home))).to(states.device)
        return (wanted - _output(self.smaller(states))).float().flatten(0, -2), wanted.float().flatten(0, -2)

    def error(self, states: Tensor) -> float:
        error = size = 0.0
        for part in _parts(states):
            lacks, wanted = self.lacks(part)
            error += float(lacks.double().square().sum())
            size += float(wanted.double().square().sum())
        return error / max(size, 1e-30)

    def projection(self, expert: int) -> Tensor:
        """(d, inner), a view of an expert's down projection."""
        return self.experts.weight("down_proj", expert)


def _output(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple | list) else output
    return value


def _parts(states: Tensor) -> Sequence[Tensor]:
    return states.split(max(1, _TOKENS // states.shape[1]))


def _update(pair: _Pair, states: Tensor, name: str) -> Compensated:
    """Try the updates on the samples held out, and keep the best of them, or none.

    Args:
        states: (N, S, d), what the mixture is given.
    """
    number = torch.arange(len(states), dtype=torch.int64, device=states.device)
    judges = number % HELD_OUT == min(HELD_OUT, len(states)) - 1
    held, used = states[judges], states[~judges]
    before = best = pair.error(held)
    start = [pair.projection(expert).clone() for expert in range(pair.experts.count)]
    chosen = start
    updates = _updates(pair, used)
    for per_damping in updates:
        for share in _SHARES:
            tried = [one + (share * step).to(one.dtype) for one, step in zip(start, per_damping, strict=True)]
            _write(pair, tried)
            error = pair.error(held)
            if error < best:
                best, chosen = error, tried
    _write(pair, chosen)
    return Compensated(name, before, best)


def _write(pair: _Pair, weights: Sequence[Tensor]) -> None:
    for expert, weight in enumerate(weights):
        pair.projection(expert).copy_(weight)


def _updates(pair: _Pair, states: Tensor) -> list[list[Tensor]]:
    """For each damping, an update (d, inner) of every expert's projection; zero for experts without tokens."""
    width, inner = pair.projection(0).shape
    bytes_each = 4 * (inner * inner + width * inner)
    group = max(1, int(_MEMORY_SHARE * available_memory(states.device)) // bytes_each)
    found: list[list[Tensor]] = [[] for _ in _DAMPINGS]
    for first in range(0, pair.experts.count, group):
        numbers = range(first, min(first + group, pair.experts.count))
        gram = states.new_zeros((len(numbers), inner, inner), dtype=torch.float32)
        cross = states.new_zeros((len(numbers), width, inner), dtype=torch.float32)
        for part in _parts(states):
            _add(pair, part, numbers, gram, cross)
        for place in range(len(numbers)):
            diagonal = gram[place].diagonal()
            mean = float(diagonal.mean())
            done = 0.0
            for updates, damping in zip(found, _DAMPINGS, strict=True):
                diagonal += (damping - done) * mean if mean > 0 else 1.0
                done = damping
                updates.append(torch.cholesky_solve(cross[place].T, torch.linalg.cholesky(gram[place])).T)
    return found


def _add(pair: _Pair, states: Tensor, numbers: range, gram: Tensor, cross: Tensor) -> None:
    """Add the products of some tokens to ``gram`` (experts, inner, inner) and ``cross`` (experts, d, inner)."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    keep: Callable[..., None] = lambda _, args, kwargs: seen.append((args, kwargs))  # noqa: E731
    handle = pair.experts.module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        lacks, _ = pair.lacks(states)
    finally:
        handle.remove()
    routing = pair.experts.route(*seen[0][0], **seen[0][1])
    for place, expert in enumerate(numbers):
        rows, weights = routing.experts[expert]
        assert weights is not None
        state = pair.experts.project(0, expert, routing.tokens[rows]).float() * weights[:, None].float()
        gram[place].addmm_(state.T, state)
        cross[place].addmm_(lacks[rows].T, state)
