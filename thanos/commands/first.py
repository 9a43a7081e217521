"""What a model's files tell before Transformers is imported, which alone takes seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from thanos.checkpoint.update import FLOATS, Place, tensor_places, weight_files
from thanos.options import WalkOptions

_LENGTH = "max_position_embeddings"
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling")  # no table of positions, of which some could be reserved
_IN_A_BLOCK = re.compile(r"\.\d+\..*\.weight$")


def refuse_by_files(model: str, job: Any, sequence_length: int | None) -> None:
    """Refuse what shows in ``config.json`` and in the headers of safetensors files, without knowing the model's class.

    Nothing is refused here that could be right; what is not known from the files is checked later.

    Args:
        model: a directory; of anything else nothing is known.
        job: what is to be done; options of another kind than :class:`WalkOptions` say nothing of single layers.
        sequence_length: that was asked for; None where it follows the model.

    Raises:
        ValueError: the model takes no such length, or no matrix of its blocks can be pruned so.
    """
    folder = Path(model)
    config = _config(folder)
    if config is None:
        return
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    limit = text.get(_LENGTH)
    rotary = any(text.get(name) is not None for name in _ROTARY)
    if sequence_length is not None and rotary and type(limit) is int and 0 < limit < sequence_length:
        raise too_long(sequence_length, limit, model)
    if not isinstance(job, WalkOptions) or config.get("quantization_config") is not None:
        return
    try:
        places = tensor_places(weight_files(folder))
    except (OSError, ValueError):  # damage is named by what reads the weights
        return
    _refuse_shapes(places, job)


def too_long(sequence_length: int, limit: int, model: str) -> ValueError:
    """The error for samples that are longer than a model takes."""
    return ValueError(f"--sequence-length {sequence_length} is longer than the {limit} tokens that {model} takes")


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _refuse_shapes(places: dict[str, Place], job: WalkOptions) -> None:
    """Raise ValueError where every matrix of a block, whichever way round it is kept, is of a shape that does not fit.

    Where one fits, the others may be of layers that are not pruned.
    """
    excluded = re.compile(job.exclude) if job.exclude else None
    first = None
    for name, place in places.items():
        if len(place.shape) != 2 or place.dtype not in FLOATS or not _IN_A_BLOCK.search(name):
            continue
        layer = name.removesuffix(".weight")
        if excluded and excluded.search(layer):
            continue
        reasons = [reason for shape in (place.shape, place.shape[::-1]) if (reason := _refusal(job, shape))]
        if len(reasons) < 2:
            return
        first = first or f"{layer}: {reasons[0]}"
    if first is not None:
        raise ValueError(first)


def _refusal(job: WalkOptions, shape: tuple[int, ...]) -> str:
    try:
        job.check_layer(*shape)
    except ValueError as error:
        return str(error)
    return ""
