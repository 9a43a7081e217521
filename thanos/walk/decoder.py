"""The decoder blocks of a causal language model and their linear layers, found by structure.

The blocks are the largest ``nn.ModuleList`` whose elements all hold linear layers and that is not part of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from thanos.linear import is_linear, weight_of


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block.

    Attributes:
        name: its full name in the model.
        module: ``nn.Linear``, or Transformers' ``Conv1D``.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """(c, b), out features x in features: a view of the parameter's memory."""
        return weight_of(self.module)


@dataclass(frozen=True)
class Decoder:
    """A model's decoder blocks, in the order in which they run.

    Attributes:
        blocks: the modules.
        layers: the linear layers of each block.
    """

    blocks: list[nn.Module]
    layers: list[list[Layer]]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder blocks and their linear layers.

    Raises:
        ValueError: an encoder-decoder, no such blocks, fused experts, shared or quantised weights.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoder-only language models are pruned")
    prefix, blocks = _largest_list(model)
    names = [f"{prefix}.{index}" for index in range(len(blocks))]
    for name, block in zip(names, blocks, strict=True):
        _refuse_fused_experts(name, block)
    layers = [list(_linear_layers(name, block)) for name, block in zip(names, blocks, strict=True)]
    _refuse_unusable_weights(layers)
    return Decoder(blocks, layers)


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
            yield Layer(f"{prefix}.{name}" if name else prefix, module)


def _refuse_fused_experts(prefix: str, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and min(parameter.shape) > 1:
                raise ValueError(
                    f"{prefix}.{name}.{own} holds experts fused into one parameter of "
                    f"{' x '.join(map(str, parameter.shape))}; such mixture-of-experts models are not supported yet"
                )


def _refuse_unusable_weights(layers: list[list[Layer]]) -> None:
    owner: dict[int, str] = {}
    for layer in (layer for block in layers for layer in block):
        weight = layer.module.weight
        assert isinstance(weight, Tensor)
        if not weight.is_floating_point() or weight.dim() != 2 or weight.element_size() < 2:
            raise ValueError(
                f"{layer.name} holds quantised weights ({weight.dtype}); load the model in a floating dtype"
            )
        if id(weight) in owner:
            raise ValueError(f"{layer.name} shares its weight with {owner[id(weight)]}; tied layers are not supported")
        owner[id(weight)] = layer.name
