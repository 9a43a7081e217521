"""Sparse layers in a model of Transformers: put where they belong, then read, whoever reads the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import to_one_dtype
from thanos.checkpoint.update import FLOATS
from thanos.compact.base import convert_whole
from thanos.compact.files import save_again
from thanos.compact.format import DTYPES, FormatError, Manifest, opened, parse_header
from thanos.compact.forms import CLASSES, restore
from thanos.compact.structure import Structure, install


@dataclass(frozen=True)
class Placed:
    """The layers of a compact checkpoint in a model, on the meta device until they are read.

    Attributes:
        folder: the checkpoint.
        manifest: its manifest.
        structure: what its tensors are in the model.
        modules: names of the sparse layers in the model and of what holds an expert's layers; their tensors, biases
            too, are read by :func:`read_sparse`, all others as those of any checkpoint.
        names: what the tensors of the compact files are called in the model; those that are merged there with others
            are left out.
        decoded: names of the packed layers that are no linear layers in this version of Transformers.
        dtype: of dense layers among experts, and of biases.
    """

    folder: Path
    manifest: Manifest
    structure: Structure
    modules: frozenset[str]
    names: dict[str, str]
    decoded: frozenset[str]
    dtype: torch.dtype

    def is_sparse(self, tensor: str) -> bool:
        """Whether a tensor of the compact files belongs to one of ``modules``."""
        parts = self.names.get(tensor, "").split(".")
        return any(".".join(parts[:end]) in self.modules for end in range(1, len(parts)))

    def tensors(self, *, sparse: bool) -> Iterator[tuple[str, Tensor]]:
        """The tensors that belong to ``modules``, or the others that the model knows, decoded ones too, one by one.

        Raises:
            FormatError: a file is damaged.
        """
        packed = {layer.tensor for layer in self.manifest.layers.values()}
        for source in self.manifest.sources:
            with opened(self.folder / source.file) as reader:
                for name in reader.keys():  # noqa: SIM118
                    known = name in self.names or (name in self.structure.targets and name not in packed)
                    if known and self.is_sparse(name) is sparse:
                        yield name, reader.get_tensor(name).clone()
                for name in () if sparse else self.decoded:
                    layer = self.manifest.layers[name]
                    if layer.file == source.file:
                        yield layer.tensor, restore(reader, name, layer)


def shapes_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of the ordinary checkpoint."""
    headers = [parse_header(source.header, source.name) for source in manifest.sources]
    return {name: entry.shape for entries in headers for name, entry in entries.items()}


def dtype_of(manifest: Manifest) -> torch.dtype:
    """The dtype of most packed layers, or if there are none of most other numbers; PyTorch's default without any."""
    dtypes = Counter(DTYPES[layer.dtype][1] for layer in manifest.layers.values())
    for source in () if dtypes else manifest.sources:
        for entry in parse_header(source.header, source.name).values():
            if entry.dtype in FLOATS:
                dtypes[FLOATS[entry.dtype]] += math.prod(entry.shape)
    return dtypes.most_common(1)[0][0] if dtypes else torch.get_default_dtype()


def place(model: Any, folder: Path, manifest: Manifest, structure: Structure, dtype: torch.dtype) -> Placed:
    """Put empty sparse layers into a model.

    Args:
        dtype: of the model.

    Raises:
        FormatError: a layer stands for something else in this model.
    """
    installed = install(model, structure, manifest.layers, CLASSES, dtype)
    split = frozenset(structure.slots[tensor].module for tensor in installed if tensor in structure.slots)
    names = {}
    for name, layer in manifest.layers.items():
        for tensor in layer.tensors(name):
            part = tensor.removeprefix(f"{name}.")
            if part != "zero_signs" and layer.tensor in installed:
                names[tensor] = f"{installed[layer.tensor]}.{part}"
    for tensor in structure.targets:
        held = None if tensor in installed else structure.held_as(tensor, split)
        if held is not None:
            names[tensor] = held
    holders = {
        f"{path}.{name}" for path in split for name, _ in model.get_submodule(path).named_children() if name.isdigit()
    }
    alone = {name for tensor, name in installed.items() if tensor not in structure.slots}
    decoded = frozenset(name for name, layer in manifest.layers.items() if layer.tensor not in installed)
    return Placed(folder, manifest, structure, frozenset(holders | alone), names, decoded, dtype)


def read_sparse(model: nn.Module, placed: Placed) -> None:
    """Read the sparse layers that :func:`place` put into a model, and the experts beside them.

    Raises:
        FormatError: tensors contradict each other.
    """
    state = {}
    for name, tensor in placed.tensors(sparse=True):
        is_value = name in placed.structure.targets  # a bias, or the weight of an expert that stays dense
        state[placed.names[name]] = tensor.to(placed.dtype) if is_value else tensor
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{placed.folder} is damaged: {' '.join(str(error).split())}") from error
    for name in placed.modules:  # where the checkpoint has tensors of several dtypes, its model has one
        model.get_submodule(name).to(dtype=placed.dtype)


def finish(model: Any, placed: Placed) -> None:
    """Make the model one of one dtype, for evaluation, whose ``save_pretrained`` writes a compact one.

    Raises:
        FormatError: a tensor is missing.
    """
    to_one_dtype(model, placed.dtype)
    state = model.state_dict()
    if left := [name for name, tensor in state.items() if tensor.is_meta]:
        raise FormatError(f"{placed.folder} lacks the tensor {left[0]} that its configuration asks for")
    model.requires_grad_(False)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    convert_whole(model)
    model.save_pretrained = partial(save_again, model, placed.folder, placed.names, dtypes)
