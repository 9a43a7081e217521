"""Mixtures of experts: how each layout routes tokens and keeps its experts' projections, seen as linear layers.

An adapter stands for one module that holds all experts of a block in fused parameters. The walk replaces that module's
``forward`` by :func:`run`, which goes through the adapter's *stages* (the projections in, the projection out) and hands
out each expert's inputs before they are used. The module's output stays what it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Routed(NamedTuple):
    """The tokens of one expert: rows of the module's input, and the router's weights where its output is scaled."""

    rows: Tensor
    weights: Tensor | None


class Routing(NamedTuple):
    """What the router decided for a batch.

    Attributes:
        tokens: (N, d), all that reached the module.
        experts: for each expert its tokens.
        combine: from each expert's outputs, unscaled, the module's output.
    """

    tokens: Tensor
    experts: list[Routed]
    combine: Callable[[list[Tensor]], Tensor]


class Experts(ABC):
    """One module with fused experts.

    Attributes:
        stages: names of the parameters that read the same input, stage by stage.
    """

    stages: tuple[tuple[str, ...], ...]

    def __init__(self, name: str, module: nn.Module, count: int) -> None:
        self.name, self.module, self.count = name, module, count

    @abstractmethod
    def weight(self, parameter: str, expert: int) -> Tensor:
        """(c, b), a view of the parameter's memory."""

    @abstractmethod
    def route(self, *args: Any, **kwargs: Any) -> Routing:
        """What the module's arguments say of the tokens."""

    @abstractmethod
    def project(self, stage: int, expert: int, inputs: Tensor) -> Tensor:
        """What a stage makes of ``inputs`` (n, b): the next stage's inputs, or the expert's output."""

    def holder(self) -> nn.Module:
        """The module whose parameters the names are."""
        return self.module

    def parameter_name(self, parameter: str) -> str:
        """A parameter's full name in the model."""
        return f"{self.name}.{parameter}"


class FusedExperts(Experts):
    """Transformers' ``@use_experts_implementation``: (E, c, b), or transposed (E, b, c); gates, biases and norms."""

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module, len(module.down_proj))
        self._in = "gate_up_proj" if module.has_gate else "up_proj"
        self.stages = ((self._in,), ("down_proj",))

    def weight(self, parameter: str, expert: int) -> Tensor:
        weight: Tensor = getattr(self.module, parameter).detach()[expert]
        return weight.T if self.module.is_transposed else weight

    def route(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Routing:
        return _top_k(hidden_states, top_k_index, top_k_weights, self.count)

    def project(self, stage: int, expert: int, inputs: Tensor) -> Tensor:
        module: Any = self.module
        parameter = self.stages[stage][0]
        bias = getattr(module, f"{parameter}_bias")[expert] if module.has_bias else None
        output = linear(inputs, self.weight(parameter, expert), bias)
        if stage == 0:
            return module._apply_gate(output) if module.has_gate else module.act_fn(output)
        return module.post_expert_norm(output) if module.has_post_expert_norm else output


class DbrxExperts(Experts):
    """DBRX: all experts' rows one below the other in three matrices of an inner module."""

    stages = (("w1", "v1"), ("w2",))

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module, module.num_experts)

    def holder(self) -> nn.Module:
        return self.module.mlp  # type: ignore[return-value]

    def parameter_name(self, parameter: str) -> str:
        return f"{self.name}.mlp.{parameter}"

    def weight(self, parameter: str, expert: int) -> Tensor:
        weight = getattr(self.module.mlp, parameter).detach().unflatten(0, (self.count, -1))[expert]
        return weight.T if parameter == "w2" else weight

    def route(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Routing:
        return _top_k(hidden_states, top_k_index, top_k_weights, self.count)

    def project(self, stage: int, expert: int, inputs: Tensor) -> Tensor:
        if stage == 1:
            return linear(inputs, self.weight("w2", expert))
        gate = self.module.mlp.activation_fn(linear(inputs, self.weight("w1", expert)))  # type: ignore[union-attr, operator]
        return gate * linear(inputs, self.weight("v1", expert))


class Llama4Experts(Experts):
    """Llama 4: every expert is given every token, scaled by its router's weight, zero where it was not chosen."""

    stages = (("gate_up_proj",), ("down_proj",))

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module, module.num_experts)

    def weight(self, parameter: str, expert: int) -> Tensor:
        weight: Tensor = getattr(self.module, parameter).detach()[expert]
        return weight.T

    def route(self, hidden_states: Tensor) -> Routing:
        rows = hidden_states.detach().ne(0).any(1).view(self.count, -1)
        length = rows.shape[1]
        routed = [Routed(rows[e].nonzero()[:, 0] + e * length, None) for e in range(self.count)]

        def combine(outputs: list[Tensor]) -> Tensor:
            whole = torch.zeros_like(hidden_states)
            for one, output in zip(routed, outputs, strict=True):
                whole[one.rows] = output
            return whole

        return Routing(hidden_states, routed, combine)

    def project(self, stage: int, expert: int, inputs: Tensor) -> Tensor:
        output = linear(inputs, self.weight(self.stages[stage][0], expert))
        if stage == 1:
            return output
        gate, up = output.chunk(2, dim=-1)
        return up * self.module.act_fn(gate)  # type: ignore[operator]


class ParallelExperts(Experts):
    """JetMoE and older Granite: one projection (E, c, b), its tokens sorted by expert, with the counts beside them."""

    stages = (("weight",),)

    def __init__(self, name: str, module: Any) -> None:
        super().__init__(name, module, module.num_experts)

    def weight(self, parameter: str, expert: int) -> Tensor:
        weight: Tensor = getattr(self.module, parameter).detach()[expert]
        return weight

    def route(self, inputs: Tensor, expert_size: Any) -> Routing:
        counts = expert_size.tolist() if isinstance(expert_size, Tensor) else list(expert_size)
        ends = list(accumulate(counts))
        device = inputs.device
        routed = [
            Routed(torch.arange(end - count, end, dtype=torch.int64, device=device), None)
            for count, end in zip(counts, ends, strict=True)
        ]
        return Routing(inputs, routed, torch.cat)

    def project(self, stage: int, expert: int, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight("weight", expert))


def _top_k(hidden: Tensor, index: Tensor, weights: Tensor, count: int) -> Routing:
    """By ``index`` and ``weights`` (N, k) of each token's experts; an index of ``count`` is no expert's."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    index, weights = index.reshape(len(tokens), -1), weights.reshape(len(tokens), -1)
    experts = []
    for expert in range(count):
        rows, slots = (index == expert).nonzero(as_tuple=True)
        experts.append(Routed(rows, weights[rows, slots]))

    def combine(outputs: list[Tensor]) -> Tensor:
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        if tokens.dtype == torch.float64:
            total = total.double()
        for one, output in zip(experts, outputs, strict=True):
            assert one.weights is not None
            total.index_add_(0, one.rows, (output * one.weights[:, None]).to(total.dtype))
        return total.to(hidden.dtype).view(hidden.shape)

    return Routing(tokens, experts, combine)


def adapt(name: str, module: nn.Module) -> Experts | None:
    """The adapter of a module with fused experts, None where it holds none that is known."""
    kind = type(module).__name__
    three = {own: p for own, p in module.named_parameters(recurse=False) if p.dim() == 3 and not own.endswith("bias")}
    decorated = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"))
    if decorated and "down_proj" in three and ("gate_up_proj" if module.has_gate else "up_proj") in three:
        return FusedExperts(name, module)
    if kind == "Llama4TextExperts":
        return Llama4Experts(name, module)
    if kind == "DbrxExperts" and hasattr(module, "num_experts"):  # in Transformers 4 it is called in another way
        return DbrxExperts(name, module)
    if kind.endswith("ParallelExperts") and list(three) == ["weight"]:
        return ParallelExperts(name, module)
    return None


Pooled = Callable[[int, list[tuple[Tensor, Tensor | None]]], None]
Seen = Callable[[int, int, Tensor, Tensor | None], None]


def run(experts: Experts, routing: Routing, pooled: Pooled, seen: Seen, everything: bool) -> Tensor:
    """The module's output; each expert's inputs are shown before they are used.

    Args:
        pooled: called at the beginning of each stage, ``pooled(stage, parts)`` with (inputs, scale) of all its tokens.
        seen: ``seen(stage, expert, inputs, scale)``: inputs (n, b), perhaps none, and, in the last stage, the router's
            weights (n,) where the output is scaled by them.
        everything: show each expert all tokens, as if all were routed to it; outputs stay as routed.
    """
    current = [routing.tokens[one.rows] for one in routing.experts]
    last = len(experts.stages) - 1
    for stage in range(last + 1):
        scales = [one.weights if stage == last and stage > 0 else None for one in routing.experts]
        pooled(stage, [(routing.tokens, None)] if stage == 0 else list(zip(current, scales, strict=True)))
        for expert, (inputs, scale) in enumerate(zip(current, scales, strict=True)):
            if everything:
                inputs, scale = routing.tokens, None
                for before in range(stage):
                    inputs = experts.project(before, expert, inputs)
            seen(stage, expert, inputs, scale)
        current = [experts.project(stage, expert, inputs) for expert, inputs in enumerate(current)]
    return routing.combine(current)
