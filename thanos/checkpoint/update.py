"""A pruned model's directory: the source's own files, with the pruned tensors written over the old ones.

What is not pruned is not touched: other tensors, the configuration, the tokenizer, licences and remote code stay the
source's, byte for byte. Where tensors cannot be written so (a source that is not in safetensors, another dtype), the
weights are saved by Transformers and the other files are copied all the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from thanos.checkpoint.writing import save_model

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|tflite)(\.index\.json)?$|\.index\.json$")
INDEX = "model.safetensors.index.json"
_QUANTISATION = ("quantization_config", "compression_config")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file: from its byte ``begin``, ``size`` of them."""

    file: Path
    begin: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def weight_files(source: Path) -> list[Path]:
    """The safetensors files of a model directory that Transformers reads; none where it reads another format.

    Raises:
        ValueError: the index names a file that is not there or not in the directory, or is damaged.
    """
    index = source / INDEX
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {type(error).__name__}") from error
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{index} names {name}, which is not in its directory")
        if not (source / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there")
    return [source / name for name in names]


def save_pruned(model: Any, tokenizer: Any, source: Path | None, changed: Iterable[str], folder: Path) -> bool:
    """Write a pruned model to ``folder``.

    Args:
        model: loaded from ``source``, then pruned.
        tokenizer: saved only where the source is no directory.
        source: the model directory it came from; None for another kind of source, such as a GGUF file.
        changed: names of the parameters that were pruned.

    Returns:
        Whether the tensors were written into copies of the source's files.
    """
    changed = sorted(changed)
    updates = prepare(model, tokenizer, source, changed, folder)
    if updates:
        patches = Patches(model, folder)
        patches(patches.collect(changed))
    return updates


def prepare(model: Any, tokenizer: Any, source: Path | None, changed: Iterable[str], folder: Path) -> bool:
    """Fill ``folder`` with what a pruned model's directory holds, the model as it is: dense, if it is not pruned yet.

    Args:
        model, tokenizer, source, changed, folder: as for :func:`save_pruned`.

    Returns:
        Whether these are the source's own files, in which the changed tensors are to be written by :class:`Patches`;
        else Transformers saved the model.
    """
    if updates_source(model, source, changed):
        assert source is not None
        copy_others(source, folder)
        for file in weight_files(source):
            (folder / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(source))
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, folder / INDEX)
        return True
    save_model(model, tokenizer if source is None else None, folder)
    if source is not None:
        copy_others(source, folder)
        if is_quantised(source) or model.dtype != _declared_dtype(source, tensor_places(weight_files(source))):
            _declare_dtype(folder / "config.json", model.dtype)
    return False


def save_smaller(model: Any, tokenizer: Any, source: Path | None, folder: Path) -> None:
    """Write a model of another shape: weights and configuration are new, the other files are the source's."""
    save_model(model, tokenizer if source is None else None, folder)
    if source is not None:
        copy_others(source, folder, keep=("config.json",))


def updates_source(model: Any, source: Path | None, changed: Iterable[str]) -> bool:
    """Whether every changed parameter has its place in the source's safetensors files, which keep the model's dtype."""
    if source is None or is_quantised(source):
        return False
    places = tensor_places(weight_files(source))
    state = {name: model.get_parameter(name).detach().to("meta") for name in changed}
    return _as_in_source(model, state, places) is not None and model.dtype == _declared_dtype(source, places)


class Patches:
    """Writes parameters over those in a model directory, each at its place in the safetensors files.

    Args:
        model: the model whose parameters they are.
        folder: where it was saved.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._places = tensor_places(weight_files(folder))

    def collect(self, changed: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of the files, on the CPU, that hold the parameters of these names.

        Raises:
            ValueError: one of them has no place in the files.
        """
        names = sorted(changed)
        state = {name: self._model.get_parameter(name).detach() for name in names}
        tensors = _as_in_source(self._model, state, self._places)
        if tensors is None:
            raise ValueError(f"the saved model has no place for the pruned {names[0]} and its like")
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what was collected, and wait until it is on the disk."""
        by_file: dict[Path, list[str]] = {}
        for name in tensors:
            by_file.setdefault(self._places[name].file, []).append(name)
        for file, inside in by_file.items():
            with file.open("r+b") as stream:
                for name in inside:
                    _overwrite(stream, self._places[name], tensors[name])
                stream.flush()
                os.fsync(stream.fileno())


def write_index(folder: Path, files: Mapping[str, str], size: int) -> None:
    """Write the index of a directory of several safetensors files.

    Args:
        files: the file of each tensor, by its name.
        size: bytes of all tensors.
    """
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def tensor_places(files: Iterable[Path]) -> dict[str, Place]:
    """Where each tensor of some safetensors files lies.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size - 8:
                    raise ValueError("it is shorter than its header says")
                header = json.loads(stream.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    found[name] = Place(file, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error or type(error).__name__}") from error
    return found


def _as_in_source(model: Any, state: dict[str, Tensor], places: dict[str, Place]) -> dict[str, Tensor] | None:
    """The tensors under the source's names and in its layout; None where one of them has no place there."""
    reverted = _reverted(model, state)
    found = {}
    for name, tensor in reverted.items():
        match = next((other for other in source_names(model, name) if other in places), None)
        if match is None or places[match].shape != tuple(tensor.shape) or places[match].dtype not in FLOATS:
            return None
        found[match] = tensor
    return found


def _reverted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What Transformers would save: names and layouts before its conversions at loading."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 there are renamings only
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return reverted


def source_names(model: Any, name: str) -> list[str]:
    """What a tensor may be called in a checkpoint: with or without the prefix of the base model, or renamed."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    names = [name, name.removeprefix(prefix), prefix + name]
    for old, new in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        before = re.sub(r"\(.*\)", "", old.lstrip("^"))
        renamed, count = re.subn(new, before, name)
        if count:
            names.append(renamed)
            break
    return names


def _overwrite(stream: BinaryIO, place: Place, tensor: Tensor) -> None:
    content = tensor.detach().to("cpu", FLOATS[place.dtype]).contiguous().view(torch.uint8)
    stream.seek(place.begin)
    stream.write(content.numpy().data)


def copy_others(source: Path, folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Copy all but weights, hidden files and those to ``keep`` as they are in ``folder``; into directories too."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if any(part.startswith(".") for part in inner.parts) or not path.is_file() or _WEIGHTS.search(path.name):
            continue
        if str(inner) in keep:
            continue
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / inner)


def _declared_dtype(source: Path, places: dict[str, Place]) -> torch.dtype | None:
    """The dtype that Transformers takes for this checkpoint when it is left to choose."""
    config = json.loads((source / "config.json").read_text())
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    for part in (config, config.get("text_config") or {}):
        if (declared := part.get("dtype") or part.get("torch_dtype")) in known:
            return known[declared]
    return next((FLOATS[place.dtype] for place in places.values() if place.dtype in FLOATS), None)


def is_quantised(source: Path) -> bool:
    """Whether a model directory says that its weights are quantised; they are floating numbers where they were read."""
    return any(name in json.loads((source / "config.json").read_text()) for name in _QUANTISATION)


def _declare_dtype(file: Path, dtype: torch.dtype) -> None:
    """Say in a configuration that the weights are of a floating dtype, and not quantised."""
    config = json.loads(file.read_text())
    for name in _QUANTISATION:
        config.pop(name, None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = str(dtype).removeprefix("torch.")
    if not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
