"""The decoder blocks of a causal language model and their linear layers, found by structure.

The blocks are the largest ``nn.ModuleList`` whose elements all hold linear layers and that is not part of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thanos.linear import is_linear, weight_of
from thanos.walk.experts import Experts, adapt

_LARGE = 0.2  # of a block's weights: a parameter that is no linear layer's may not hold more


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block, or one projection of one expert.

    Attributes:
        name: its full name in the model; ``...mlp.experts.gate_up_proj[17]`` for an expert.
        module: ``nn.Linear``, Transformers' ``Conv1D``, or the module that holds the experts.
        experts, parameter, expert: the fused experts that it belongs to, in which parameter, and the expert's number.
    """

    name: str
    module: nn.Module
    experts: Experts | None = None
    parameter: str = "weight"
    expert: int = 0

    @property
    def weight(self) -> Tensor:
        """(c, b), out features x in features: a view of the parameter's memory."""
        if self.experts is not None:
            return self.experts.weight(self.parameter, self.expert)
        return weight_of(self.module)

    @property
    def parameter_name(self) -> str:
        """The full name of the parameter that holds it."""
        return f"{self.name}.weight" if self.experts is None else self.experts.parameter_name(self.parameter)


@dataclass(frozen=True)
class Decoder:
    """A model's decoder blocks, in the order in which they run.

    Attributes:
        blocks: the modules.
        layers: the linear layers of each block, the projections of experts among them.
        skipped: of each block, the linear layers that stay dense whatever is asked for, with the reason.
    """

    blocks: list[nn.Module]
    layers: list[list[Layer]]
    skipped: list[dict[str, Layer]]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder blocks and their linear layers.

    Raises:
        ValueError: an encoder-decoder, no such blocks, experts of an unknown layout, shared or quantised weights.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoder-only language models are pruned")
    prefix, blocks = _largest_list(model)
    layers, skipped = [], []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        experts = [known for inner, module in block.named_modules() if (known := adapt(_join(name, inner), module))]
        _refuse_unknown_weights(name, block, experts)
        routers = _routers(name, block, experts)
        linears = list(_linear_layers(name, block))
        layers.append([layer for layer in linears if layer.name not in routers] + list(_projections(experts)))
        skipped.append({layer.name: layer for layer in linears if layer.name in routers})
    _refuse_unusable_weights(layers)
    return Decoder(blocks, layers, skipped)


def _largest_list(model: nn.Module) -> tuple[str, list[nn.Module]]:
    found: list[tuple[int, str, list[nn.Module]]] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for _, outer, _ in found)
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or nested:
            continue
        if all(any(is_linear(part) for part in block.modules()) for block in module):
            found.append((sum(p.numel() for p in module.parameters()), name, list(module)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks with linear layers to prune")
    _, name, blocks = max(found, key=lambda entry: entry[0])
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError(f"{name} lists the same block more than once; models with shared blocks are not supported")
    return name, blocks


def _linear_layers(prefix: str, block: nn.Module) -> Iterator[Layer]:
    for name, module in block.named_modules():
        if is_linear(module):
            yield Layer(_join(prefix, name), module)


def _projections(experts: list[Experts]) -> Iterator[Layer]:
    for module in experts:
        for stage in module.stages:
            for expert in range(module.count):
                for parameter in stage:
                    name = f"{module.name}.{parameter}[{expert}]"
                    yield Layer(name, module.module, module, parameter, expert)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else prefix


def _routers(prefix: str, block: nn.Module, experts: list[Experts]) -> set[str]:
    """Names of the linear layers that choose or weigh experts: beside the experts, with one output for each, or one."""
    found: set[str] = set()
    groups = {module.name: module.count for module in experts}
    for name, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and all(map(_holds_linear, module)):
            groups[_join(prefix, name)] = len(module)
    for group, count in groups.items():
        parent = group.rpartition(".")[0]
        for layer in _linear_layers(prefix, block):
            beside = layer.name.startswith(f"{parent}.") and not layer.name.startswith(f"{group}.")
            if beside and len(parent) >= len(prefix) and len(layer.weight) in (1, count):
                found.add(layer.name)
    return found


def _holds_linear(module: nn.Module) -> bool:
    return any(is_linear(part) for part in module.modules())


def _refuse_unknown_weights(prefix: str, block: nn.Module, experts: list[Experts]) -> None:
    """Refuse a block in which much of the weight is held by something that is neither a linear layer nor known."""
    known = {id(parameter) for module in experts for parameter in module.holder().parameters(recurse=False)}
    total = sum(parameter.numel() for parameter in block.parameters())
    for name, module in block.named_modules():
        if is_linear(module) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in known or parameter.dim() < 2:
                continue
            fused = parameter.dim() == 3 and min(parameter.shape) > 1
            if fused or parameter.numel() > _LARGE * total:
                raise ValueError(
                    f"{_join(prefix, name)}.{own} ({' x '.join(map(str, parameter.shape))}) in "
                    f"{type(module).__name__} is no linear layer, nor holds it experts in a known layout"
                )


def _refuse_unusable_weights(layers: list[list[Layer]]) -> None:
    owner: dict[tuple[Any, ...], str] = {}
    for layer in (layer for block in layers for layer in block):
        weight = layer.weight
        if not weight.is_floating_point() or weight.dim() != 2 or weight.element_size() < 2:
            raise ValueError(
                f"{layer.name} holds quantised weights ({weight.dtype}); load the model in a floating dtype"
            )
        place = weight.untyped_storage()._cdata, weight.storage_offset()
        if place in owner:
            raise ValueError(f"{layer.name} shares its weight with {owner[place]}; tied layers are not supported")
        owner[place] = layer.name
