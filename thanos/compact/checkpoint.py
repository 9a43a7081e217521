"""Compact checkpoints: pruned linear layers stored, loaded and run compressed (docs/format.md).

:func:`pack` turns an ordinary checkpoint into a compact one, :func:`load` makes a Transformers model of it without ever
holding a dense weight of a compressed layer, and :func:`unpack` restores the ordinary checkpoint, to the byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thanos.checkpoint import check_target, fill, staged
from thanos.compact.base import SparseLinear, convert_whole
from thanos.compact.card import add_note, remove_note
from thanos.compact.files import copy_others, save_again, weight_files
from thanos.compact.format import (
    DTYPES,
    MANIFEST,
    FormatError,
    Layer,
    Manifest,
    Source,
    expands_too_far,
    parse_header,
    read_header,
    read_manifest,
)
from thanos.compact.layers import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear, columns_removed, rows_not_24
from thanos.compact.structure import Structure, build, examine, install
from thanos_kernels.sparse import WORD

_CLASSES: dict[str, type[SparseLinear]] = {
    "columns": ColumnPrunedLinear,
    "sparse24": Sparse24Linear,
    "bitmask": BitmaskLinear,
}
_WORTH = 0.95  # of the dense bytes: a layer that saves less stays dense
_NEAR = 1.02  # of the smallest form: the faster of forms this near is taken
_PARTS = ("values", "bits", "metadata", "columns", "outliers", "outlier_rows", "zero_signs")


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` did: each linear layer's kind, and bytes before and after.

    The kind is "dense" where a layer was left as it is, and "fused" of a tensor that holds the projections of several
    experts, which is left as well.
    """

    kinds: dict[str, str]
    dense_bytes: int
    compact_bytes: int


def choose(weight: Tensor) -> str:
    """The kind of layer for a weight (out_features, in_features): "columns", "sparse24", "bitmask" or "dense".

    The smallest form wins; among forms within 2% of it, the one that runs faster. A layer that would not save 5% stays
    dense.
    """
    rows, columns = weight.shape
    size = weight.itemsize
    bytes_of = {}
    removed = columns_removed(weight)
    if bool(removed.any()):
        outliers = int((weight[:, removed] != 0).any(1).sum())
        kept = columns - int(removed.sum())
        bytes_of["columns"] = ((rows - outliers) * kept + outliers * columns) * size + 8 * (kept + outliers)
    if columns % 16 == 0:
        outliers = int(rows_not_24(weight).sum())
        if 2 * outliers <= rows:
            values = (rows - outliers) * columns // 2 + outliers * columns
            bytes_of["sparse24"] = values * size + (rows - outliers) * columns // 8 + 8 * outliers
    bytes_of["bitmask"] = int(weight.count_nonzero()) * size + rows * -(-columns // WORD) * 8
    best = min(bytes_of.values())
    if best > _WORTH * weight.nbytes:
        return "dense"
    fit = [kind for kind in _CLASSES if bytes_of.get(kind, 2 * weight.nbytes) <= _NEAR * best + 64]
    return next(kind for kind in [*fit, "bitmask"] if not expands_too_far((rows, columns), size, bytes_of[kind]))


def pack(source: str | Path, output: str | Path, *, overwrite: bool = False, trust_remote_code: bool = False) -> Packed:
    """Write the compact form of an ordinary checkpoint (a directory with safetensors files) to ``output``.

    Only linear layers that the model's configuration knows are compressed; all other tensors and files are kept.

    Args:
        overwrite: replace a model in ``output``.
        trust_remote_code: run the Python code that comes with the model. Nothing in a checkpoint can ask for it.

    Raises:
        ValueError: no such checkpoint, not in safetensors, damaged, without a tensor that its configuration asks for,
            or ``output`` cannot be written.
    """
    source, output = Path(source), Path(output)
    if (source / MANIFEST).is_file():
        raise ValueError(f"{source} is a compact checkpoint already")
    check_target(output, overwrite=overwrite, source=str(source))
    files, index = weight_files(source)
    headers = {file: read_header(source / file) for file in files}
    shapes = {name: entry.shape for _, entries in headers.values() for name, entry in entries.items()}
    structure = examine(source, shapes, trust_remote_code)
    linears = {name for name in structure.linears if name.endswith(".weight")}
    if not linears:
        raise ValueError(f"{source} holds no linear layer that could be packed; it is used as it is")
    layers: dict[str, Layer] = {}
    kinds: dict[str, str] = {}
    sizes = [0, 0]
    sources = []
    with staged(output, overwrite=overwrite) as folder:
        for number, file in enumerate(files, 1):
            compact = f"compact-{number:05d}-of-{len(files):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            with safe_open(source / file, framework="pt") as reader:
                for tensor in headers[file][1]:
                    weight = reader.get_tensor(tensor)
                    name = tensor.removesuffix(".weight")
                    if tensor not in linears:
                        tensors[tensor] = weight
                        if tensor in structure.fused:
                            kinds[tensor] = "fused"
                            sizes = [size + weight.nbytes for size in sizes]
                        continue
                    packed = _compress(weight, tensor, compact, structure.linears[tensor])
                    taken = packed is not None and not any(f"{name}.{part}" in shapes for part in _PARTS)
                    kept = packed[1] if packed is not None and taken else {"weight": weight}
                    kinds[name] = packed[0].kind if packed is not None and taken else "dense"
                    if packed is not None and taken:
                        layers[name] = packed[0]
                    tensors |= {f"{name}.{part}": value.contiguous() for part, value in kept.items()}
                    sizes[0] += weight.nbytes
                    sizes[1] += sum(value.nbytes for value in kept.values())
            save_file(tensors, folder / compact)
            sources.append(Source(file, headers[file][0], compact))
        Manifest(layers, sources, index).write(folder)
        copy_others(source, folder, {*files, *([index[0]] if index else [])})
        add_note(folder)
    return Packed(kinds, sizes[0], sizes[1])


def load(folder: str | Path, *, device: str | torch.device | None = None, trust_remote_code: bool = False) -> Any:
    """The Transformers model of a compact checkpoint: its sparse layers in place, for evaluation, without gradients.

    Raises:
        FormatError: (a ValueError) the checkpoint is damaged, of another version, or contradicts itself or its
            configuration; nothing was built then.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shapes = _ordinary_shapes(manifest)
    structure = examine(folder, shapes, trust_remote_code)
    dtypes = Counter(DTYPES[layer.dtype][1] for layer in manifest.layers.values())
    dtype = dtypes.most_common(1)[0][0] if dtypes else torch.get_default_dtype()
    model = build(structure.config, trust_remote_code, meta=False, dtype=dtype)
    installed = install(model, structure, manifest.layers, shapes, _CLASSES, dtype)
    names = _names_in_model(manifest, structure, installed)
    dense: dict[str, Tensor] = {}
    sparse: dict[str, Tensor] = {}
    for source in manifest.sources:
        with safe_open(folder / source.file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                if name in names and name not in structure.targets:
                    sparse[names[name]] = reader.get_tensor(name).clone()
                elif name in structure.slots and name in names:
                    sparse[names[name]] = reader.get_tensor(name).to(dtype, copy=True)
                elif name in structure.targets:
                    dense[name] = reader.get_tensor(name).clone()
            for name, layer in manifest.layers.items():
                if layer.file == source.file and layer.tensor not in installed:
                    dense[layer.tensor] = _restore(reader, name, layer)
    try:
        model.load_state_dict(sparse, strict=False, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{folder} is damaged: {' '.join(str(error).split())}") from error
    del sparse
    fill(model, dense, dtype)
    model.tie_weights()
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise FormatError(f"{folder} lacks the tensor {left[0]} that its configuration asks for")
    model.requires_grad_(False)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.name_or_path = str(folder)
    dtypes_now = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    convert_whole(model)
    model.save_pretrained = partial(save_again, model, folder, names, dtypes_now)
    return model.eval() if device is None else model.eval().to(device)


def unpack(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Restore to ``output`` the ordinary checkpoint that a compact one was made of, every file as it was.

    Raises:
        FormatError: (a ValueError) the checkpoint is damaged; nothing is written then.
        ValueError: ``output`` cannot be written.
    """
    folder, output = Path(folder), Path(output)
    manifest = read_manifest(folder)
    check_target(output, overwrite=overwrite, source=str(folder))
    by_tensor = {layer.tensor: (name, layer) for name, layer in manifest.layers.items()}
    with staged(output, overwrite=overwrite) as target:
        for source in manifest.sources:
            header = source.header.encode("utf-8")
            entries = parse_header(source.header, source.name)
            with safe_open(folder / source.file, framework="pt") as reader, (target / source.name).open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
                    if tensor in by_tensor:
                        restored = _restore(reader, *by_tensor[tensor])
                    else:
                        restored = reader.get_tensor(tensor)
                    data = restored.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    if len(data) != entry.end - entry.begin:
                        raise FormatError(f"{folder / source.file}: tensor {tensor} has {len(data)} bytes")
                    file.write(data)
        if manifest.index is not None:
            (target / manifest.index[0]).write_bytes(manifest.index[1].encode("utf-8"))
        copy_others(folder, target, {MANIFEST, *(source.file for source in manifest.sources)})
        remove_note(target)


def _compress(weight: Tensor, tensor: str, file: str, transposed: bool) -> tuple[Layer, dict[str, Tensor]] | None:
    """The layer and its tensors, or None where the weight stays dense."""
    names = {dtype: name for name, (_, dtype) in DTYPES.items()}
    if weight.dtype not in names:
        return None
    matrix = weight.T.contiguous() if transposed else weight
    kind = choose(matrix)
    if kind == "dense":
        return None
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    sparse = _CLASSES[kind].from_linear(linear)
    parts = dict(sparse.state_dict())
    zeros = matrix == 0
    negative = zeros & torch.signbit(matrix)
    if bool(negative.any()):
        parts["zero_signs"] = torch.from_numpy(np.packbits(negative[zeros].numpy(), bitorder="little"))
    kept = {"bitmask": len(parts["values"]), "sparse24": matrix.shape[1] // 2}.get(kind, parts["values"].shape[-1])
    layer = Layer(
        kind=kind,
        tensor=tensor,
        file=file,
        shape=(matrix.shape[0], matrix.shape[1]),
        dtype=names[weight.dtype],
        transposed=transposed,
        outlier_rows=len(parts.get("outlier_rows", ())),
        kept=kept,
        zero_signs=int(zeros.sum()) if "zero_signs" in parts else 0,
    )
    restored = _with_signs(sparse.weight, parts.get("zero_signs"))
    return (layer, parts) if _same_bits(restored, matrix) else None


def _restore(reader: Any, name: str, layer: Layer) -> Tensor:
    """The tensor of the ordinary checkpoint."""
    rows, columns = layer.shape
    sparse = _CLASSES[layer.kind](columns, rows, False, "meta", DTYPES[layer.dtype][1])
    parts = {tensor.removeprefix(f"{name}."): reader.get_tensor(tensor) for tensor in layer.tensors(name)}
    signs = parts.pop("zero_signs", None)
    try:
        sparse.load_state_dict(parts, assign=True)
        weight = _with_signs(sparse.weight, signs, layer.zero_signs)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"layer {name} is damaged: {' '.join(str(error).split())}") from error
    return weight.T.contiguous() if layer.transposed else weight


def _with_signs(weight: Tensor, signs: Tensor | None, count: int | None = None) -> Tensor:
    """Make negative the zeros whose bits are set, in row-major order, the low bits first."""
    bits = weight.view(torch.int16 if weight.itemsize == 2 else torch.int32)
    zeros = weight == 0
    bits.masked_fill_(zeros, 0)  # a filler of 2:4 may have been a negative zero
    if signs is None:
        return weight
    number = int(zeros.sum())
    if count is not None and count != number:
        raise ValueError(f"{count} signs are stored for {number} zeros")
    negative = np.unpackbits(signs.numpy(), count=number, bitorder="little").astype(bool)
    places = zeros.view(-1).nonzero()[:, 0][torch.from_numpy(negative)]
    bits.view(-1)[places] = torch.iinfo(bits.dtype).min
    return weight


def _same_bits(left: Tensor, right: Tensor) -> bool:
    kind = torch.int16 if left.itemsize == 2 else torch.int32
    return left.shape == right.shape and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def _names_in_model(manifest: Manifest, structure: Structure, installed: dict[str, str]) -> dict[str, str]:
    """What the compact files' tensors are called in the model; those that are merged there with others are left out."""
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
    return names


def _ordinary_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    headers = [parse_header(source.header, source.name) for source in manifest.sources]
    return {name: entry.shape for entries in headers for name, entry in entries.items()}
