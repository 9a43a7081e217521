"""What Transformers makes of a checkpoint's tensors: their names in the model, and the parameters they merge into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from thanos.checkpoint.update import source_names


@dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
        parameter: the parameter or buffer of the model, or the first of several; perhaps one that the model lacks.
        name: the tensor's own name after renaming.
        converter: Transformers' description of what is made of it and others, None where it is taken as it is.
        pattern: the converter's pattern that fits ``name``.
    """

    parameter: str
    name: str
    converter: Any = None
    pattern: str = ""


@dataclass(frozen=True)
class Filled:
    """What :func:`fill` did not find: parameters without a tensor, and those of another shape (found, asked for)."""

    missing: frozenset[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def can_convert() -> bool:
    """Whether this version of Transformers, 5 or newer, converts parts of a checkpoint."""
    try:
        from transformers.core_model_loading import (  # noqa: F401
            convert_and_load_state_dict_in_model,
            rename_source_key,
        )
    except ImportError:
        return False
    return True


def targets(model: Any, names: Iterable[str], mapping: list[Any] | None = None) -> dict[str, Target]:
    """For each tensor of a checkpoint where it goes.

    Args:
        mapping: Transformers' conversions and renamings; by default those of the model.
    """
    if not can_convert():
        return _renamed_by_older(model, names)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _mapping(model) if mapping is None else mapping
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()
    found = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if parameter not in known and name in known:
            parameter, pattern = rename_source_key(name, [], [], prefix, known)
        if pattern is None:
            found[name] = Target(parameter, parameter)
        else:
            renamed, _ = rename_source_key(name, renamings, [])
            found[name] = Target(parameter, renamed, by_pattern[pattern], pattern)
    return found


def fill(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Filled:
    """Put a checkpoint's tensors into a model, converted as Transformers does; all stay on the device that they are on.

    Args:
        tensors: under the checkpoint's names, all that one parameter is made of together.
        dtype: the model's. Modules that Transformers keeps in float32 are.
    """
    known = model.state_dict()
    if not can_convert():
        placed = {target.parameter: tensors[name] for name, target in targets(model, tensors).items()}
        wrong = {name: _shapes(tensor, known[name]) for name, tensor in placed.items() if name in known}
        wrong = {name: shapes for name, shapes in wrong.items() if shapes[0] != shapes[1]}
        fitting = {name: tensor for name, tensor in placed.items() if name in known and name not in wrong}
        model.load_state_dict(fitting, strict=False, assign=True)
        return Filled(frozenset(known.keys() - placed.keys()), wrong)
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    device = next((str(tensor.device) for tensor in tensors.values()), "cpu")
    options: dict[str, Any] = {
        "device_map": {"": device},
        "dtype": dtype,
        "dtype_plan": plan,
        "weight_mapping": _mapping(model),
    }
    quiet = mock.patch("transformers.core_model_loading.tqdm", lambda items, **_: items)
    with one_thread(), quiet:
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), LoadStateDictConfig(**options))
    mismatched = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info.mismatched_keys}
    return Filled(frozenset(info.missing_keys), mismatched)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, Transformers reads tensors one after the other: those that wait to be merged are not held twice."""
    with mock.patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
        yield


def _mapping(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(model)
    return mapping


def _renamed_by_older(model: Any, names: Iterable[str]) -> dict[str, Target]:
    """Transformers before version 5 renames, and merges nothing."""
    there = set(names)
    found = {name: Target(name, name) for name in there}
    for own in model.state_dict():
        match = next((name for name in source_names(model, own) if name in there), None)
        if match is not None:
            found[match] = Target(own, own)
    return found


def _shapes(left: Tensor, right: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(left.shape), tuple(right.shape)
