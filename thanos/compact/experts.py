"""Mixtures whose checkpoint holds each expert's projections by themselves, and whose model holds them in fused tensors.

Such a model loads with every expert's projections as linear layers again, compressed where they were packed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import Target
from thanos.walk.experts import FusedExperts, adapt


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a checkpoint stands in a fused parameter (experts, out_features, in_features).

    Attributes:
        module: name of the module of the experts.
        parameter: the fused parameter's own name there.
        expert: which of the experts.
        part: what the checkpoint calls this projection, such as ``w1``.
        order: its place among the projections that are concatenated.
    """

    module: str
    parameter: str
    expert: int
    part: str
    order: int

    @property
    def layer(self) -> str:
        """The linear layer's name in a model of :class:`SparseExperts`."""
        return f"{self.module}.{self.expert}.{self.part}"


def find_slots(model: nn.Module, places: Mapping[str, Target]) -> dict[str, Slot]:
    """The tensors that are one expert's projection, of modules that :class:`SparseExperts` can stand for."""
    found: dict[str, dict[str, Slot | None]] = defaultdict(dict)
    for name, target in places.items():
        if target.converter is not None:
            found[target.parameter][name] = _slot(target)
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        experts = adapt(path, module)
        if isinstance(experts, FusedExperts) and not experts.module.is_transposed and not experts.module.has_bias:
            parts = [found.get(experts.parameter_name(own), {}) for stage in experts.stages for own in stage]
            if all(_is_whole(part, experts.count) for part in parts):
                slots |= {name: slot for part in parts for name, slot in part.items() if slot is not None}
    return slots


def fused_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that hold the projections of several experts."""
    found = (adapt(path, module) for path, module in model.named_modules())
    return {one.parameter_name(own) for one in found if one is not None for stage in one.stages for own in stage}


def _slot(target: Target) -> Slot | None:
    """None where the tensor is merged in another way than by stacking experts and concatenating output features."""
    converter = target.converter
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    sources = list(converter.source_patterns)
    if len(converter.target_patterns) != 1 or (len(steps) == 1 and len(sources) != 1):
        return None
    _, star, tail = target.pattern.partition("*.")
    match = re.search(rf"\.(\d+)\.{re.escape(tail.rstrip('$'))}$", target.name)
    if not star or match is None or not tail.rstrip("$").endswith(".weight"):
        return None
    module, _, parameter = target.parameter.rpartition(".")
    part = tail.rstrip("$").removesuffix(".weight")
    return Slot(module, parameter, int(match[1]), part, sources.index(target.pattern))


def _is_whole(part: Mapping[str, Slot | None], count: int) -> bool:
    """Whether these tensors are all that a fused parameter of ``count`` experts is made of, each once."""
    places = {(slot.expert, slot.order) for slot in part.values() if slot is not None}
    orders = {order for _, order in places}
    wanted = {(expert, order) for expert in range(count) for order in range(len(orders))} if part else {(0, 0)}
    return len(part) == len(wanted) and places == wanted


class SparseExperts(nn.Module):
    """The experts of a block, each projection a linear layer of its own, which is read for the tokens routed to it.

    Args:
        fused: Transformers' module, whose settings, activation and norm stay in use.
        layers: for each of the fused parameters, in the order of their use, and each expert, the linear layers by
            their names; outputs are concatenated.
    """

    def __init__(self, fused: nn.Module, layers: Mapping[str, list[dict[str, nn.Module]]]) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in fused.__dict__.items() if name not in self.__dict__})
        self._fused = type(fused)
        self._modules.update(fused._modules)
        self._buffers.update(fused._buffers)
        self._parameters.update({name: value for name, value in fused._parameters.items() if name not in layers})
        self._stages = [[list(parts) for parts in experts] for experts in layers.values()]
        for expert, stages in enumerate(zip(*layers.values(), strict=True)):
            holder = nn.Module()
            for parts in stages:
                for part, layer in parts.items():
                    holder.add_module(part, layer)
            self.add_module(str(expert), holder)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The routed sum of the experts' outputs, outside of a compiled graph: which are read follows from the tokens.

        Args:
            hidden_states: (N, d).
            top_k_index: (N, k), each token's experts; a number beyond the last is no expert's.
            top_k_weights: (N, k).
        """
        if torch.compiler.is_compiling():  # the decorator would import the compiler with this file
            result: Tensor = torch.compiler.disable(self._routed)(hidden_states, top_k_index, top_k_weights)
            return result
        return self._routed(hidden_states, top_k_index, top_k_weights)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = top_k_index.reshape(len(tokens), -1), top_k_weights.reshape(len(tokens), -1)
        outputs: Tensor | None = None
        for expert in index.unique().tolist():
            if not 0 <= expert < len(self._stages[0]):
                continue
            rows, slots = (index == expert).nonzero(as_tuple=True)
            output = self._expert(expert, tokens[rows])
            if outputs is None:
                outputs = output.new_zeros((*index.shape, output.shape[-1]))
            outputs[rows, slots] = output
        if outputs is None:
            return torch.zeros_like(hidden_states)
        total = (outputs * weights.unsqueeze(-1)).sum(1)
        return total.to(hidden_states.dtype).view(*hidden_states.shape[:-1], -1)

    def _expert(self, expert: int, inputs: Tensor) -> Tensor:
        settings: Any = self
        kind: Any = self._fused
        held = self.get_submodule(str(expert))
        for stage, experts in enumerate(self._stages):
            made = [getattr(held, part)(inputs) for part in experts[expert]]
            inputs = made[0] if len(made) == 1 else torch.cat(made, -1)
            if stage == 0:
                inputs = kind._apply_gate(self, inputs) if settings.has_gate else settings.act_fn(inputs)
        return settings.post_expert_norm(inputs) if settings.has_post_expert_norm else inputs
