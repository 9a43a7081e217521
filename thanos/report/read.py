"""Reading a run's ``pruning.json``: of this version, an older one or a newer one, and refused where it is damaged."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thanos.report.record import FILE_NAME

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|\[|$)")
_EXPERT = re.compile(r"\[(\d+)\]$")


@dataclass(frozen=True)
class Run:
    """A run as a page shows it: whatever its record holds.

    Attributes:
        title: what it is called: the name of its directory.
        record: the whole record, as ``pruning.json`` has it.
        layers: its layers, each a mapping with ``name`` at least.
    """

    title: str
    record: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]

    def text(self, name: str) -> str:
        """An entry of the record; empty where there is none."""
        value = self.record.get(name)
        return "" if value is None else str(value)

    def number(self, *path: str) -> float | None:
        """A number of the record, such as ``number("perplexity", "dense")``; None where there is none."""
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return as_number(value)

    def part(self, name: str) -> Mapping[str, Any]:
        """An entry of the record that holds others; empty where there is none."""
        value = self.record.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def options(self) -> Mapping[str, Any]:
        return self.part("options")

    @property
    def model(self) -> str:
        """The model that was pruned; empty where the record does not say."""
        return str(self.options.get("model") or "")

    @cached_property
    def places(self) -> Sequence[Place]:
        """Where each layer stands."""
        return [place(layer["name"]) for layer in self.layers]

    @cached_property
    def worst(self) -> Sequence[Mapping[str, Any]]:
        """The layers with a relative loss, the largest first."""
        known = [layer for layer in self.layers if as_number(layer.get("relative_loss")) is not None]
        return sorted(known, key=lambda layer: -float(layer["relative_loss"]))

    @cached_property
    def raised(self) -> Sequence[Mapping[str, Any]]:
        """The layers that were damped more than was asked for."""
        asked = as_number(self.options.get("damping"))
        if asked is None:
            return []
        return [layer for layer in self.layers if (as_number(layer.get("damping")) or 0.0) > asked * (1 + 1e-6)]

    def outliers(self, layer: Mapping[str, Any]) -> int | None:
        """How many of a layer's rows were left untouched; None where the record does not say."""
        said = as_number(layer.get("outlier_rows"))
        if said is not None:
            return int(said)
        alpha, shape = as_number(self.options.get("outlier_fraction")), layer.get("shape")
        return math.ceil(round(alpha * shape[0], 9)) if alpha is not None and shape else None


@dataclass(frozen=True)
class Place:
    """Where a layer stands: its block, its kind (its name in there, without numbers), and its expert."""

    block: int | None
    kind: str
    expert: int | None


def place(name: str) -> Place:
    """``model.layers.3.mlp.experts.up_proj[17]`` is block 3, ``mlp.experts.up_proj``, expert 17."""
    found = _NUMBER.search(name)
    block = int(found[0]) if found else None
    inner = name[found.end() + 1 :] if found else name
    expert = _EXPERT.search(inner)
    number = int(expert[1]) if expert else None
    inner = _EXPERT.sub("", inner)
    deeper = _NUMBER.search(f".{inner}")
    if number is None and deeper:
        number = int(deeper[0])
    return Place(block, _NUMBER.sub("*", f".{inner}")[1:] or name, number)


def as_number(value: Any) -> float | None:
    """A finite number as it is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_run(folder: Path) -> Run:
    """The run that made the model in ``folder``.

    Raises:
        ValueError: there is no record, the run was not finished, or the record is damaged.
    """
    file = folder / FILE_NAME if folder.is_dir() else folder
    partial = folder.absolute().with_name(folder.absolute().name + ".partial")
    if not file.is_file() and partial.is_dir():
        raise ValueError(
            f"{folder} holds no finished run: {partial} was interrupted; finish it with the same command and --resume"
        )
    if not folder.exists():
        raise ValueError(f"there is no directory {folder}; name one that thanos.prune wrote")
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {FILE_NAME}, so thanos.prune did not write it; name a directory that it did"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({type(error).__name__}); prune the model again") from error
    except RecursionError as error:
        raise ValueError(f"{file} is damaged: it is nested too deeply; prune the model again") from error
    try:
        return run_of(file.absolute().parent.name, record)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; prune the model again") from error


def run_of(title: str, record: Any) -> Run:
    """A run from its record.

    Raises:
        ValueError: the record is not one of a run.
    """
    if not isinstance(record, dict):
        raise ValueError("it holds no object")
    layers = record.get("layers", [])
    if not isinstance(layers, list):
        raise ValueError("its layers are no list")
    for number, layer in enumerate(layers):
        if not isinstance(layer, dict) or not isinstance(layer.get("name"), str):
            raise ValueError(f"layer {number} has no name")
        for key in ("loss", "relative_loss", "sparsity", "damping", "tokens", "zeros"):
            if not isinstance(layer.get(key), float | None) and as_number(layer[key]) is None:
                raise ValueError(f"the {key} of {layer['name']} is no number")
        shape = layer.get("shape")
        if shape is not None and not (
            isinstance(shape, list | tuple) and len(shape) == 2 and all(as_number(side) is not None for side in shape)
        ):
            raise ValueError(f"the shape of {layer['name']} is no pair of numbers")
        if not isinstance(layer.get("seconds", {}), dict):
            raise ValueError(f"the seconds of {layer['name']} are no object")
    for key in ("options", "seconds", "calibration", "perplexity", "versions", "size", "dense"):
        if record.get(key) is not None and not isinstance(record[key], dict):
            raise ValueError(f"its {key} is no object")
    if record.get("excluded") is not None and not isinstance(record["excluded"], list):
        raise ValueError("its excluded layers are no list")
    if record.get("recovery") is not None and not isinstance(record["recovery"], list):
        raise ValueError("its recoveries are no list")
    return Run(title, record, layers)
