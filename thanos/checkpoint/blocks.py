"""A model directory without some of its blocks, made from the files of another without reading them whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from thanos.checkpoint.update import INDEX, Place, copy_others, source_names, tensor_places, weight_files, write_index

_CHUNK = 1 << 24


def save_without_blocks(
    model: Any, config: Any, source: Path, prefix: str, staying: Sequence[int], folder: Path
) -> None:
    """Write the directory of a smaller model; tensors go from file to file, a few megabytes at a time.

    Args:
        model: of ``source``, its blocks in memory or not; it knows what its tensors may be called in a file.
        config: of the smaller model.
        source: a directory with safetensors files.
        prefix: of the blocks' names in the model, such as ``model.layers``.
        staying: the numbers of the blocks that stay, in their new order.
        folder: where to.

    Raises:
        ValueError: a file of the source is damaged, or ends too early.
    """
    names = "|".join(map(re.escape, source_names(model, prefix)))
    block = re.compile(rf"({names})\.(\d+)\.(.*)", re.DOTALL)
    number = {old: new for new, old in enumerate(staying)}
    weight_map: dict[str, str] = {}
    size = 0
    for file in weight_files(source):
        places: dict[str, Place] = {}
        for name, place in tensor_places([file]).items():
            found = block.fullmatch(name)
            if found is None:
                places[name] = place
            elif int(found[2]) in number:
                places[f"{found[1]}.{number[int(found[2])]}.{found[3]}"] = place
        if places:
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            size += _write(places, target)
            weight_map |= dict.fromkeys(places, file.relative_to(source).as_posix())
    if (source / INDEX).is_file():
        write_index(folder, weight_map, size)
    config.save_pretrained(folder)
    copy_others(source, folder, keep=("config.json",))


def _write(places: dict[str, Place], target: Path) -> int:
    """A safetensors file of these tensors, under their new names; how many bytes they hold."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, place in places.items():
        begin, end = end, end + place.size
        header[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for place in places.values():
            with place.file.open("rb") as stream:
                stream.seek(place.begin)
                _copy(stream, output, place.size, place.file)
    return end


def _copy(stream: BinaryIO, output: BinaryIO, length: int, file: Path) -> None:
    while length:
        part = stream.read(min(_CHUNK, length))
        if not part:
            raise ValueError(f"the model's file {file} is truncated")
        output.write(part)
        length -= len(part)
