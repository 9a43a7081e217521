"""Compact checkpoints: pruned linear layers stored, loaded and run compressed (docs/format.md).

:func:`pack` turns an ordinary checkpoint into a compact one, :func:`load` makes a Transformers model of it without ever
holding a dense weight of a compressed layer, and :func:`unpack` restores the ordinary checkpoint, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from thanos.checkpoint import INDEX, check_floating, check_target, fill, staged
from thanos.compact.card import add_note, remove_note
from thanos.compact.files import copy_others, mark, unmark, weight_files
from thanos.compact.format import (
    MANIFEST,
    PLACE_HOLDER,
    FormatError,
    Layer,
    Manifest,
    Source,
    opened,
    parse_header,
    read_header,
    read_manifest,
)
from thanos.compact.forms import PARTS, compress, restore
from thanos.compact.placing import dtype_of, finish, place, read_sparse, shapes_of
from thanos.compact.structure import build, examine

VALUES = ("plain", "int8")


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` did: each linear layer's kind, and bytes before and after.

    The kind is "dense" where a layer was left as it is, and "fused" of a tensor that holds the projections of several
    experts, which is left as well.
    """

    kinds: dict[str, str]
    dense_bytes: int
    compact_bytes: int

    def __str__(self) -> str:
        share = self.compact_bytes / self.dense_bytes if self.dense_bytes else 1.0
        return f"{self.dense_bytes:,} bytes of linear layers became {self.compact_bytes:,} ({share:.3f})"


def pack(
    source: str | Path,
    output: str | Path,
    *,
    values: str = "plain",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Packed:
    """Write the compact form of an ordinary checkpoint (a directory with safetensors files) to ``output``.

    Only linear layers that the model's configuration knows are compressed; all other tensors and files are kept.

    Args:
        values: "plain" keeps each value that was not pruned as it is; "int8" rounds them, with a float16 scale for each
            128 columns of a row. Layers that were not pruned are left alone.
        overwrite: replace a model in ``output``.
        trust_remote_code: run the Python code that comes with the model. Nothing in a checkpoint can ask for it.

    Raises:
        ValueError: no such checkpoint, not in safetensors, damaged, without a tensor that its configuration asks for,
            or ``output`` cannot be written.
    """
    source, output = Path(source), Path(output)
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, not {values!r}")
    if (source / MANIFEST).is_file():
        raise ValueError(f"{source} is a compact checkpoint already")
    check_target(output, overwrite=overwrite, source=str(source))
    files, index = weight_files(source)
    headers = {file: read_header(source / file) for file in files}
    shapes = {name: entry.shape for _, entries in headers.values() for name, entry in entries.items()}
    structure = examine(source, shapes, trust_remote_code)
    check_floating(source, structure.config)
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
            with opened(source / file) as reader:
                for tensor in headers[file][1]:
                    weight = reader.get_tensor(tensor)
                    name = tensor.removesuffix(".weight")
                    if tensor not in linears:
                        tensors[tensor] = weight
                        if tensor in structure.fused:
                            kinds[tensor] = "fused"
                            sizes = [size + weight.nbytes for size in sizes]
                        continue
                    packed = compress(weight, tensor, compact, structure.linears[tensor], int8=values == "int8")
                    taken = packed is not None and not any(f"{name}.{part}" in shapes for part in PARTS)
                    kept = packed[1] if packed is not None and taken else {"weight": weight}
                    kinds[name] = packed[0].kind if packed is not None and taken else "dense"
                    if packed is not None and taken:
                        layers[name] = packed[0]
                        tensors[tensor] = weight.new_empty(PLACE_HOLDER)
                    tensors |= {f"{name}.{part}": value.contiguous() for part, value in kept.items()}
                    sizes[0] += weight.nbytes
                    sizes[1] += sum(value.nbytes for value in kept.values())
            save_file(tensors, folder / compact, {"format": "pt"})
            sources.append(Source(file, headers[file][0], compact))
        Manifest(layers, sources, index).write(folder)
        copy_others(source, folder, {*files, *([index[0]] if index else [])})
        mark(folder, [source.file for source in sources])
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
    structure = examine(folder, shapes_of(manifest), trust_remote_code)
    dtype = dtype_of(manifest)
    model = build(structure.config, trust_remote_code, meta=False, dtype=dtype)
    placed = place(model, folder, manifest, structure, dtype)
    read_sparse(model, placed)
    fill(model, dict(placed.tensors(sparse=False)), dtype)
    model.tie_weights()
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.name_or_path = str(folder)
    finish(model, placed)
    return model.eval() if device is None else model.eval().to(device)


def unpack(folder: str | Path, output: str | Path, *, overwrite: bool = False) -> None:
    """Restore to ``output`` the ordinary checkpoint that a compact one was made of, every file as it was.

    Of values that were rounded to int8, the weights files hold what they were rounded to.

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
            with opened(folder / source.file) as reader, (target / source.name).open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for tensor, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
                    packed = by_tensor.get(tensor)
                    restored = reader.get_tensor(tensor) if packed is None else restore(reader, *packed)
                    data = restored.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    if len(data) != entry.end - entry.begin:
                        raise FormatError(f"{folder / source.file}: tensor {tensor} has {len(data)} bytes")
                    file.write(data)
        if manifest.index is not None:
            (target / manifest.index[0]).write_bytes(manifest.index[1].encode("utf-8"))
        copy_others(folder, target, {MANIFEST, INDEX, *(source.file for source in manifest.sources)})
        remove_note(target)
        if manifest.version > 1:
            unmark(target)
