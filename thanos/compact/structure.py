"""What the tensors of a checkpoint are in its model, which is built without memory and compared with them."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thanos.checkpoint import Target, auto_class, fill, load_config, quantisation, targets
from thanos.compact.base import SparseLinear
from thanos.compact.experts import Slot, SparseExperts, find_slots, fused_parameters
from thanos.compact.files import METHOD
from thanos.compact.format import DTYPES, FormatError, Layer
from thanos.linear import is_plain, is_transposed
from thanos.walk.experts import adapt

_REGISTERING = threading.RLock()  # held while nn.Module.register_parameter is another


@dataclass(frozen=True)
class Structure:
    """A checkpoint's tensors in their model.

    Attributes:
        config: the model's configuration.
        linears: the tensors that are a linear layer's weight: name to whether it is transposed.
        fused: the tensors that are the projections of several experts and cannot be told apart.
        slots: the tensors that are one expert's projection and are merged with others at loading.
        targets: for each tensor where it goes.
        shapes: of all tensors of the ordinary checkpoint.
    """

    config: Any
    linears: dict[str, bool]
    fused: frozenset[str]
    slots: dict[str, Slot]
    targets: dict[str, Target]
    shapes: dict[str, tuple[int, ...]]

    def held_as(self, tensor: str, split: frozenset[str]) -> str | None:
        """What a tensor is called in a model whose modules ``split`` hold experts apart; None if merged."""
        slot, target = self.slots.get(tensor), self.targets[tensor]
        if slot is not None and slot.module in split:
            return f"{slot.layer}.weight"
        return target.parameter if target.converter is None else None


def examine(folder: Path, shapes: dict[str, tuple[int, ...]], trusted: bool) -> Structure:
    """Compare a configuration with the tensors of a checkpoint.

    Args:
        shapes: of all tensors of the ordinary checkpoint.

    Raises:
        FormatError: tensors are missing or of other shapes.
        ValueError: as of :func:`thanos.checkpoint.load_config`.
    """
    config = load_config(str(folder), trust_remote_code=trusted)
    if (packed := quantisation(config)) not in (None, METHOD):
        raise ValueError(f"{folder} holds quantised weights ({packed}); only floating numbers are packed")
    check_depth(config, folder, shapes)
    return describe(build(config, trusted, meta=True), config, folder, shapes)


def check_depth(config: Any, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a configuration of more layers than there are tensors, before a model is built of it.

    Raises:
        FormatError: it is one.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(shapes):
        raise FormatError(f"{folder}/config.json asks for {layers} layers, but there are {len(shapes)} tensors")


def describe(model: Any, config: Any, folder: Path, shapes: dict[str, tuple[int, ...]]) -> Structure:
    """What the tensors of a checkpoint are in a model without memory, which is of no further use.

    Args:
        config: its configuration.
        folder: the checkpoint, for messages.
        shapes: of all tensors of the ordinary checkpoint.

    Raises:
        FormatError: tensors are missing or of other shapes.
    """
    places, own = targets(model, shapes), model.state_dict()
    for name, target in places.items():
        if target.converter is None and target.parameter in own:
            _compare(folder, name, shapes[name], tuple(own[target.parameter].shape))
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    linears, slots = _linears(model, places, owners), find_slots(model, places)
    several = fused_parameters(model)
    fused = frozenset(name for name, target in places.items() if target.parameter in several and name not in slots)
    meta = {name: torch.empty(shape, dtype=torch.float32, device="meta") for name, shape in shapes.items()}
    filled = fill(model, meta, torch.float32)
    for name, (found, wanted) in filled.mismatched.items():
        _compare(folder, name, found, wanted)
    held = {owner for name, owner in owners.items() if name not in filled.missing}
    for name, owner in owners.items():
        if owner not in held:
            raise FormatError(f"{folder} has no tensor {name}, which its configuration asks for")
    return Structure(config, linears | dict.fromkeys(slots, False), fused, slots, places, shapes)


def install(
    model: Any,
    structure: Structure,
    layers: Mapping[str, Layer],
    classes: Mapping[str, type[SparseLinear]],
    dtype: torch.dtype,
) -> dict[str, str]:
    """Put empty sparse layers into a model: for each packed tensor the name of the layer that stands for it.

    What is a linear layer in another version of Transformers and none in this one, such as a router or an expert, is
    left out: it has to be decoded. A module of fused experts of which one is packed becomes :class:`SparseExperts`, the
    others in it dense.

    Args:
        layers: what was packed.
        classes: of the kinds of layers.
        dtype: of dense layers.

    Raises:
        FormatError: a layer stands for something else in this model.
    """
    packed = {layer.tensor: layer for layer in layers.values()}
    installed = {}
    for tensor, layer in packed.items():
        if tensor in structure.slots:
            continue
        target = structure.targets[tensor]
        name = target.parameter.removesuffix(".weight")
        old = _find(model, name)
        if target.converter is not None or (old is not None and not is_plain(old)):
            continue
        if name == target.parameter or old is None:
            raise FormatError(f"{tensor} is no linear layer's weight in this model, so its sparse form has no place")
        if is_transposed(old) != layer.transposed:
            raise FormatError(f"{name} is a {type(old).__name__} here, which its sparse form cannot stand for")
        model.set_submodule(name, _empty(layer, classes, old.bias is not None))
        installed[tensor] = name
    members: dict[str, list[tuple[Slot, str]]] = defaultdict(list)
    for tensor, slot in structure.slots.items():
        members[slot.module].append((slot, tensor))
    for module in {structure.slots[tensor].module for tensor in packed if tensor in structure.slots}:
        fused = adapt(module, model.get_submodule(module))
        assert fused is not None
        stages: dict[str, list[dict[str, nn.Module]]] = {
            own: [{} for _ in range(fused.count)] for stage in fused.stages for own in stage
        }
        for slot, tensor in sorted(members[module], key=lambda member: member[0].order):
            (rows, columns), mine = structure.shapes[tensor], packed.get(tensor)
            if mine is None:
                dense = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
                stages[slot.parameter][slot.expert][slot.part] = dense
                continue
            if mine.transposed:
                raise FormatError(f"{tensor} is not transposed in this model, and its sparse form is")
            stages[slot.parameter][slot.expert][slot.part] = _empty(mine, classes, False)
            installed[tensor] = slot.layer
        model.set_submodule(module, SparseExperts(fused.module, stages))
    return installed


def build(config: Any, trusted: bool, *, meta: bool, dtype: torch.dtype | None = None) -> Any:
    """The model of a configuration, its parameters without memory; buffers are computed unless ``meta``."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": trusted} | ({} if dtype is None else {"dtype": dtype})
    try:
        with _REGISTERING, torch.device("meta") if meta else _parameters_without_memory():
            return (auto_class(config) or AutoModelForCausalLM).from_config(config, **options)
    except Exception as error:  # configurations fail in as many ways as there are models
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(f"the configuration of {config.model_type} does not make a model: {reason}") from error


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Within, every parameter that a module of this thread registers moves to the meta device at once."""
    own = threading.get_ident()
    with _REGISTERING, torch.device("cpu"):
        register = nn.Module.register_parameter

        def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and not parameter.is_meta and threading.get_ident() == own:
                parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            register(module, name, parameter)

        nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _linears(model: nn.Module, places: Mapping[str, Target], owners: Mapping[str, int]) -> dict[str, bool]:
    """The tensors that are the weight of one linear layer: name to whether it is transposed."""
    count = Counter(owners.values())
    modules = dict(model.named_modules())
    linears = {}
    for tensor, target in places.items():
        module = modules.get(target.parameter.removesuffix(".weight"))
        if target.converter is not None or target.parameter not in owners or module is None:
            continue
        if is_plain(module) and count[owners[target.parameter]] == 1:  # one shared with the embedding stays as it is
            linears[tensor] = is_transposed(module)
    return linears


def _compare(folder: Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise FormatError(f"{folder}: tensor {name} has shape {found}, but config.json asks for {wanted}")


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _empty(layer: Layer, classes: Mapping[str, type[SparseLinear]], bias: bool) -> SparseLinear:
    rows, columns = layer.shape
    return classes[layer.kind](columns, rows, bias, "meta", DTYPES[layer.dtype][1])
