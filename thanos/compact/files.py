"""The files of compact checkpoints and of the ordinary ones that they are made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from thanos.checkpoint import INDEX, write_index
from thanos.compact.format import MANIFEST, FormatError, opened, read_header, read_manifest

CONFIG = "config.json"
METHOD = "thanos"  # the name by which Transformers finds what reads compact checkpoints
_MARK = f'\n  "quantization_config": {{"quant_method": "{METHOD}", "format": "thanos-compact"}},'


def weight_files(folder: Path) -> tuple[list[str], tuple[str, str] | None]:
    """The safetensors files of a checkpoint, and its index where it has several."""
    index = folder / INDEX
    if index.is_file():
        text = index.read_bytes().decode("utf-8")
        try:
            files = sorted({str(file) for file in json.loads(text)["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of safetensors files: {error!r}") from error
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{index} names files in other directories")
        return files, (index.name, text)
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no model.safetensors and no index of several: only safetensors are packed")
    return ["model.safetensors"], None


def copy_others(source: Path, target: Path, without: set[str]) -> None:
    """Copy what is in a directory, but for the files of these names and hidden ones."""
    for path in source.iterdir():
        if path.name in without or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def mark(folder: Path, files: list[str]) -> None:
    """Make a directory with these compact files one that Transformers reads with :mod:`thanos.compact.quantizer`.

    ``config.json`` gets a ``quantization_config`` in front, and an index names the file of each tensor.

    Raises:
        ValueError: ``config.json`` has a ``quantization_config`` already.
    """
    path = folder / CONFIG
    text = path.read_bytes().decode("utf-8")
    if "quantization_config" in json.loads(text):
        raise ValueError(f"{path} says that the weights are quantised already; only plain weights are packed")
    before, brace, after = text.partition("{")
    path.write_bytes((before + brace + _MARK + after).encode("utf-8"))
    places, total = {}, 0
    for file in files:
        for name, entry in read_header(folder / file)[1].items():
            places[name] = file
            total += entry.end - entry.begin
    write_index(folder, places, total)


def unmark(folder: Path) -> None:
    """Take back what :func:`mark` did to ``config.json``: to the byte, unless the file was written anew since.

    Raises:
        FormatError: (a ValueError) it holds no JSON object.
    """
    path = folder / CONFIG
    try:
        text = path.read_bytes().decode("utf-8")
        if _MARK in text:
            path.write_bytes(text.replace(_MARK, "", 1).encode("utf-8"))
            return
        content = json.loads(text)
        if content.pop("quantization_config", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{path} holds no configuration: {error}") from error


def save_again(
    model: Any,
    source: Path,
    names: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    save_directory: str | Path,
    **others: Any,
) -> None:
    """What ``save_pretrained`` of a loaded model does: its compact checkpoint once more, with its tensors as they are.

    Args:
        model: loaded from ``source``, its compact checkpoint.
        names: what tensors of ``source`` are called in the model. Of others, those of ``source`` are saved.
        dtypes: of the model's tensors as they were loaded.

    Raises:
        ValueError: the model is of another dtype or shape than when it was packed, the directory is the one that it
            came from, or an option is given that means something else for ordinary models.
        FormatError: (a ValueError) ``source`` is gone or damaged.
    """
    if unknown := sorted(others.keys() - {"safe_serialization", "max_shard_size"}):
        raise ValueError(f"a compact model is saved as it was packed; {unknown[0]} is no option of that")
    manifest, target = read_manifest(source), Path(save_directory)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} holds the checkpoint that the model was loaded from; save it in another directory")
    state = model.state_dict()
    for name, own in names.items():
        if own in state and state[own].dtype != dtypes[own]:
            raise ValueError(
                f"{name} was packed as {dtypes[own]} and is {state[own].dtype} now: a compact model is saved in the "
                "dtype that it was packed in"
            )
    for part in manifest.sources:
        for name, entry in read_header(source / part.file)[1].items():
            now = state.get(names.get(name, ""))
            if now is not None and tuple(now.shape) != tuple(entry.shape):
                raise ValueError(
                    f"{name} was packed with the shape {tuple(entry.shape)} and has {tuple(now.shape)} now: a compact "
                    "model is saved in the shape that it was packed in"
                )
    target.mkdir(parents=True, exist_ok=True)
    for part in manifest.sources:
        with opened(source / part.file) as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            for name, packed in tensors.items():
                now = state.get(names.get(name, ""))
                if now is not None and not torch.equal(now.cpu(), packed.to(now.dtype)):
                    tensors[name] = now.to("cpu", packed.dtype)
            held = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
            save_file(held, target / part.file, reader.metadata())
    manifest.write(target)
    copy_others(source, target, {MANIFEST, *(part.file for part in manifest.sources)})
