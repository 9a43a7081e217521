"""The decoder blocks of a causal language model and their linear layers, found by structure.

The blocks are the largest ``nn.ModuleList`` whose elements all hold linear layers and that is not part of another one,
of those in the smallest part of the model that holds its input embeddings too: a vision tower may be larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from thanos.linear import is_linear, weight_of
from thanos.walk.experts import Experts, adapt
from thanos.walk.weights import refuse_adapters, refuse_quantised, shared, why_dense

_LARGE = 0.2  # of a block's weights: parameters that are no linear layer's may not hold more
_SMALL = 0.05  # of a block's weights: a matrix that holds less, and is no linear layer's, is not spoken of
_ROUTER = "it routes tokens to experts"
SHARES = "it shares its weight with"


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
    def holder(self) -> nn.Module:
        """The module whose own parameter holds it."""
        return self.module if self.experts is None else self.experts.holder()

    @property
    def parameter_name(self) -> str:
        """The full name of the parameter that holds it."""
        return f"{self.name}.weight" if self.experts is None else self.experts.parameter_name(self.parameter)


@dataclass(frozen=True)
class Dense:
    """A weight of a block that stays dense whatever is asked for: a linear layer's, or another parameter's.

    Attributes:
        reason: why, to follow its name in brackets.
        weights: how many numbers it holds; 0 where another entry counts the same ones.
    """

    reason: str
    weights: int


@dataclass(frozen=True)
class Decoder:
    """A model's decoder blocks, in the order in which they run.

    Attributes:
        blocks: the modules.
        layers: the linear layers of each block that can be pruned, the projections of experts among them.
        skipped: of each block, by name, the weights that stay dense whatever is asked for.
    """

    blocks: list[nn.Module]
    layers: list[list[Layer]]
    skipped: list[dict[str, Dense]]


def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder blocks and their linear layers.

    Raises:
        ValueError: an encoder-decoder, adapters, quantised weights, no such blocks, much of whose weight is in no
            known form, or no layer that can be pruned.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; only decoder-only language models are pruned")
    refuse_adapters(model)
    refuse_quantised(model)
    prefix, blocks = _largest_list(model)
    layers: list[list[Layer]] = []
    skipped: list[dict[str, Dense]] = []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        experts = [known for inner, module in block.named_modules() if (known := adapt(_join(name, inner), module))]
        dense = _other_weights(name, block, experts)
        routers = _routers(name, block, experts)
        found = list(_projections(experts))
        for layer in _linear_layers(name, block):
            reason = _ROUTER if layer.name in routers else why_dense(layer.name, layer.module)
            if reason is None:
                found.append(layer)
            else:
                dense[layer.name] = Dense(reason, _held(layer.module))
        layers.append(found)
        skipped.append(dense)
    _leave_shared_weights(model, layers, skipped)
    if not any(layers):
        name, left = next(item for block in skipped for item in block.items())
        raise ValueError(
            f"{type(model).__name__} has no layer that can be pruned, for instance not {name}: {left.reason}"
        )
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
    _, name, blocks = max(_nearest(model, found), key=lambda entry: entry[0])
    seen: dict[int, int] = {}
    for index, block in enumerate(blocks):
        if seen.setdefault(id(block), index) != index:
            raise ValueError(
                f"{name} lists the same block at {seen[id(block)]} and at {index}; a block that runs more than once "
                "for a token cannot be pruned"
            )
    return name, blocks


def _nearest(model: nn.Module, lists: list[tuple[int, str, list[nn.Module]]]) -> list[tuple[int, str, list[nn.Module]]]:
    """Of lists of modules (size, name, modules), those in the smallest part that holds the model's embeddings too."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    path = next((name for name, module in model.named_modules() if module is embeddings), "")
    while path:
        path = path.rpartition(".")[0]
        inside = [entry for entry in lists if not path or entry[1].startswith(f"{path}.")]
        if inside:
            return inside
    return lists


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
            weight = getattr(layer.module, "weight", None)
            if beside and len(parent) >= len(prefix) and isinstance(weight, Tensor) and len(layer.weight) in (1, count):
                found.add(layer.name)
    return found


def _holds_linear(module: nn.Module) -> bool:
    return any(is_linear(part) for part in module.modules())


def _other_weights(prefix: str, block: nn.Module, experts: list[Experts]) -> dict[str, Dense]:
    """The weights of a block beside linear layers, convolutions, embeddings and known experts.

    Raises:
        ValueError: they are much of the block, so that what would be pruned is not what was asked for.
    """
    known = {id(parameter) for module in experts for parameter in module.holder().parameters(recurse=False)}
    total = sum(parameter.numel() for parameter in block.parameters())
    found: dict[str, Dense] = {}
    described: dict[str, str] = {}
    spoken_of: set[str] = set()
    for name, module in block.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding) or _belongs_to_linear(name, block):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in known or parameter.dim() < 2 or min(parameter.shape) < 2:
                continue
            where, kind = _join(_join(prefix, name), own), type(module).__name__
            routes = len(parameter) in {module.count for module in experts} and parameter.dim() == 2
            reason = _ROUTER if routes else f"a parameter of {kind}, which is no linear layer"
            found[where] = Dense(reason, parameter.numel())
            spoken_of |= {where} if parameter.dim() > 2 or parameter.numel() > _SMALL * total else set()
            described[where] = f"{where} ({' x '.join(map(str, parameter.shape))}) in {kind}"
    if sum(left.weights for left in found.values()) > _LARGE * total:
        largest = max(found, key=lambda name: found[name].weights)
        raise ValueError(
            f"{described[largest]} is no linear layer, nor holds it experts in a known layout, and such parameters are "
            f"more than a fifth of {prefix}"
        )
    return {name: left for name, left in found.items() if name in spoken_of}


def _belongs_to_linear(name: str, block: nn.Module) -> bool:
    """Whether a module is a linear layer or inside one, such as what computes its weight."""
    parts = name.split(".") if name else []
    return any(is_linear(block.get_submodule(".".join(parts[:end]))) for end in range(len(parts) + 1))


def _held(module: nn.Module) -> int:
    """The numbers in a linear layer's weight, computed or not."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.numel()
    return sum(parameter.numel() for name, parameter in module.named_parameters() if name != "bias")


def _leave_shared_weights(model: nn.Module, layers: list[list[Layer]], skipped: list[dict[str, Dense]]) -> None:
    """Move to ``skipped`` the layers whose weight another module, or the same one in another block, uses as well."""
    of_layers = {layer.name: layer for block in layers for layer in block}
    used = {id(layer.holder) for layer in of_layers.values()}
    others = [
        (_join(name, own), parameter)
        for name, module in model.named_modules()
        if id(module) not in used
        for own, parameter in module.named_parameters(recurse=False)
    ]
    alike = shared([(name, layer.weight) for name, layer in of_layers.items()] + others)
    counted: set[int] = set()
    for index, block in enumerate(layers):
        for layer in [layer for layer in block if layer.name in alike]:
            block.remove(layer)
            weights = 0 if id(layer.module) in counted else layer.weight.numel()
            counted.add(id(layer.module))
            skipped[index][layer.name] = Dense(f"{SHARES} {alike[layer.name]}", weights)
