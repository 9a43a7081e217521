"""Compact checkpoints: pruned linear layers stored, loaded and run compressed (docs/format.md).

:func:`pack` turns an ordinary checkpoint into a compact one, :func:`load` makes a Transformers model of it without ever
holding a dense weight of a compressed layer, and :func:`unpack` restores the ordinary checkpoint, to the byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from thanos.checkpoint import check_target, load_config, staged
from thanos.compact.files import INDEX, copy_others, mark, save_again, unmark, weight_files
from thanos.compact.format import (
    DTYPES,
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
from thanos.compact.forms import CLASSES, PARTS, compress, restore
from thanos.linear import is_plain, is_transposed

VALUES = ("plain", "int8")
_REGISTERING = threading.RLock()  # held while nn.Module.register_parameter is another


@dataclass(frozen=True)
class Packed:
    """What :func:`pack` did: each linear layer's kind ("dense" where it was left), and bytes before and after."""

    kinds: dict[str, str]
    dense_bytes: int
    compact_bytes: int


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
        ValueError: no such checkpoint, not in safetensors, damaged, of an architecture whose tensors Transformers
            renames when loading, or ``output`` cannot be written.
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
    linears = _linears(str(source), shapes, trust_remote_code)
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
                    if name == tensor or name not in linears:
                        tensors[tensor] = weight
                        continue
                    packed = compress(weight, tensor, compact, linears[name], int8=values == "int8")
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
    return Packed(kinds, sizes[0], sizes[1])


def load(folder: str | Path, *, device: str | torch.device | None = None, trust_remote_code: bool = False) -> Any:
    """The Transformers model of a compact checkpoint: its sparse layers in place, for evaluation, without gradients.

    Raises:
        FormatError: (a ValueError) the checkpoint is damaged, of another version, or contradicts itself or its
            configuration; nothing was built then.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    check_configuration(config, manifest, folder, trust_remote_code)
    model = _build(config, trust_remote_code, meta=False)
    put_layers(model, manifest, folder)
    state: dict[str, Tensor] = {}
    for source in manifest.sources:
        with opened(folder / source.file) as reader:
            names = [name for name in reader.keys() if not name.endswith(".zero_signs")]  # noqa: SIM118
            state |= {name: reader.get_tensor(name).clone() for name in names}
    try:
        model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{folder} is damaged: {' '.join(str(error).split())}") from error
    model.tie_weights()
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise FormatError(f"{folder} lacks the tensor {left[0]} that its configuration asks for")
    model.requires_grad_(False)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.name_or_path = str(folder)
    model.save_pretrained = partial(save_again, model, folder)
    return model.eval() if device is None else model.eval().to(device)


def check_configuration(config: Any, manifest: Manifest, folder: Path, trusted: bool = False) -> None:
    """Compare a configuration with the tensors that the manifest names, before anything is built of it.

    Raises:
        FormatError: it asks for other tensors.
    """
    _check_config(config, _ordinary_shapes(manifest), folder, trusted)


def put_layers(model: Any, manifest: Manifest, folder: Path) -> list[str]:
    """Put empty sparse layers, on the meta device, where a model has the linear ones; returns their names in it.

    Raises:
        FormatError: something else than a linear layer is there.
    """
    for name, layer in manifest.layers.items():
        old = model.get_submodule(name)
        if not is_plain(old) or is_transposed(old) != layer.transposed:
            raise FormatError(
                f"{folder}: {name} is a {type(old).__name__} here, which its sparse form cannot stand for"
            )
        kind, (rows, columns) = CLASSES[layer.kind], layer.shape
        new = kind(columns, rows, getattr(old, "bias", None) is not None, "meta", DTYPES[layer.dtype][1])
        model.set_submodule(name, new)
    return list(manifest.layers)


def read_layers(model: Any, manifest: Manifest, folder: Path) -> None:
    """Read the sparse layers that :func:`put_layers` put into a model, one after another.

    Raises:
        FormatError: the tensors of a layer contradict each other.
    """
    files = {name: source.file for source in manifest.sources for name in parse_header(source.header, source.name)}
    for name, layer in manifest.layers.items():
        module = model.get_submodule(name)
        places = dict.fromkeys((part for part in layer.tensors(name) if not part.endswith(".zero_signs")), layer.file)
        if module.bias is not None:
            places[f"{name}.bias"] = files[f"{name}.bias"]
        state = {}
        for part, file in places.items():
            with opened(folder / file) as reader:
                state[part.removeprefix(f"{name}.")] = reader.get_tensor(part).clone()
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise FormatError(f"{folder}: layer {name} is damaged: {' '.join(str(error).split())}") from error


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
        if manifest.version > 1:
            unmark(target)


def _ordinary_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    headers = [parse_header(source.header, source.name) for source in manifest.sources]
    return {name: entry.shape for entries in headers for name, entry in entries.items()}


def _linears(source: str, shapes: dict[str, tuple[int, ...]], trusted: bool) -> dict[str, bool]:
    """The linear layers whose weights the checkpoint holds under their own names: name to whether it is transposed."""
    model = _check_config(load_config(source, trust_remote_code=trusted), shapes, Path(source), trusted)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linears = {}
    for name, module in model.named_modules():
        if not is_plain(module) or f"{name}.weight" not in shapes:
            continue
        if owners[id(module.weight)] == 1:  # a weight shared with the embedding stays as it is
            linears[name] = is_transposed(module)
    return linears


def _check_config(config: Any, shapes: dict[str, tuple[int, ...]], folder: Path, trusted: bool) -> nn.Module:
    """Build the model without memory and compare it with the tensors; returns it."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > len(shapes):
        raise FormatError(f"{folder}/config.json asks for {layers} layers, but there are {len(shapes)} tensors")
    model = _build(config, trusted, meta=True)
    own = model.state_dict()
    for name, tensor in own.items():
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise FormatError(
                f"{folder}: tensor {name} has shape {shapes[name]}, but config.json asks for {tuple(tensor.shape)}"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in shapes if name in parameters}
    for name, parameter in parameters.items():
        if id(parameter) not in held:
            raise FormatError(
                f"{folder} has no tensor {name}, which its configuration asks for; checkpoints whose tensors "
                "Transformers renames or merges when it loads them cannot be packed"
            )
    return model


def _build(config: Any, trusted: bool, *, meta: bool) -> Any:
    """The model of a configuration, its parameters without memory; buffers are computed unless ``meta``."""
    from transformers import AutoModelForCausalLM

    try:
        with _REGISTERING, torch.device("meta") if meta else _parameters_without_memory():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)  # type: ignore[no-untyped-call]
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
