"""Which weights must be zero, and what keeps them so: exactly, after every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.pattern import SemiStructured
from thanos.recover.options import TRAINABLE, RecoverOptions
from thanos.report.read import as_number
from thanos.walk.decoder import Layer, find_decoder


@dataclass(frozen=True)
class Sparse:
    """A layer with zeros to keep.

    Attributes:
        layer: of the model.
        gone: (c, b), bool: the weights that are zero.
        exempt: (c,), bool: rows that hold no pattern and stay as they are, the outlier rows.
    """

    layer: Layer
    gone: Tensor
    exempt: Tensor


def pattern_of(record: Mapping[str, Any]) -> TRAINABLE | None:
    """The pattern that a record says its model has, where it is one that layers can be checked for."""
    from thanos.recover.options import trainable_pattern

    try:
        return trainable_pattern(str(record.get("pattern")))
    except ValueError:
        return None


def wanted_pattern(record: Mapping[str, Any], options: RecoverOptions) -> TRAINABLE | None:
    """What the zeros must be in the end: what is asked for, or the record's n:m; None keeps each layer's number."""
    recorded = pattern_of(record)
    return options.pattern or (recorded if isinstance(recorded, SemiStructured) else None)


def find_sparse(model: nn.Module, record: Mapping[str, Any], options: RecoverOptions) -> list[Sparse]:
    """The layers whose zeros are to be kept.

    They are those that the model's record names, or else all in which there are zeros. A smaller model has none.

    Args:
        record: what the model's ``pruning.json`` holds; empty where there is none.
        options: whose pattern, if there is one and the zeros are to stay as they are, the layers must have.

    Raises:
        ValueError: there is nothing to keep, or a layer does not have the pattern.
    """
    part = record.get("options")
    said: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
    layers = [layer for block in find_decoder(model).layers for layer in block]
    named = {str(entry["name"]) for entry in record.get("layers", [])} if not said.get("became") else set()
    chosen = [layer for layer in layers if not named or layer.name in named]
    wanted = options.pattern or pattern_of(record)
    found = [_sparse(layer, said, wanted) for layer in chosen]
    if options.mask != "fixed":
        return _movable(found, record, options)
    if said.get("became"):
        if options.pattern is not None:
            raise ValueError(f"the model was made smaller ({said['became'][0]}) and has no zeros of {options.pattern}")
        return []
    found = [one for one in found if bool(one.gone.any())]
    if not found:
        raise ValueError(
            "the model has no zeros to keep and no record of a smaller one; prune it first with thanos.prune, or name "
            "a pattern for --mask decaying"
        )
    if options.pattern is not None:
        for one in found:
            check_pattern(one.layer.name, one.gone, one.exempt, options.pattern)
    return found


def _movable(found: list[Sparse], record: Mapping[str, Any], options: RecoverOptions) -> list[Sparse]:
    """Layers whose zeros may move; refused where nothing says how many there are to be."""
    if options.pattern is None and str(record.get("pattern", "")).startswith("structured"):
        raise ValueError(
            "the zeros of whole columns do not move; keep --mask fixed, or name an n:m or unstructured pattern"
        )
    if options.pattern is None and not any(bool(one.gone.any()) for one in found):
        raise ValueError(f"--mask {options.mask} needs a pattern, such as 2:4 or 0.5: the model has no zeros to go by")
    if isinstance(options.pattern, SemiStructured):
        for one in found:
            try:
                options.pattern.validate(*one.gone.shape)
            except ValueError as error:
                raise ValueError(f"{one.layer.name}: {error}") from None
    return found


def has_pattern(one: Sparse, pattern: TRAINABLE | None) -> bool:
    """Whether a layer's zeros are those of a pattern; of None, whatever they are."""
    if pattern is None:
        return True
    try:
        check_pattern(one.layer.name, one.gone, one.exempt, pattern)
    except ValueError:
        return False
    return True


def _sparse(layer: Layer, said: Mapping[str, Any], pattern: TRAINABLE | None) -> Sparse:
    gone = layer.weight == 0
    exempt = torch.zeros(len(gone), dtype=torch.bool, device=gone.device)
    alpha = as_number(said.get("outlier_fraction")) or 0.0
    if alpha and isinstance(pattern, SemiStructured) and gone.shape[1] % pattern.m == 0:
        lacking = _lacking(gone, pattern)
        if int(lacking.sum()) <= math.ceil(round(alpha * len(gone), 9)):
            exempt = lacking
    return Sparse(layer, gone, exempt)


def _lacking(gone: Tensor, pattern: SemiStructured) -> Tensor:
    """(c,), bool: the rows in which some group of m has fewer than n zeros."""
    return (gone.unflatten(1, (-1, pattern.m)).sum(-1) < pattern.n).any(1)


def check_pattern(name: str, gone: Tensor, exempt: Tensor, pattern: TRAINABLE) -> None:
    """Raise ValueError, naming the layer, where its zeros are not those of the pattern."""
    rows, columns = gone.shape
    if isinstance(pattern, SemiStructured):
        pattern.validate(rows, columns)
        if bad := int((_lacking(gone, pattern) & ~exempt).sum()):
            raise ValueError(f"{name} does not have the pattern {pattern}: it is broken in {bad} of {rows} rows")
        return
    have, want = int(gone.sum()), pattern.count(gone.numel())
    if have < want:
        raise ValueError(f"{name} does not have the pattern {pattern}: {have} of its weights are zero, not {want}")


class FixedMask:
    """Zeros that stay where they are.

    Args:
        values: what is trained, by the names of the model's parameters, in float32; none need hold a mask.
        gone: of some parameters, bool, their shape: what must be zero.
    """

    def __init__(self, values: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> None:
        self._values = values
        self.gone = {name: mask for name, mask in gone.items() if name in values}

    steady = True
    """Whether a loss that rises is a sign of a rate that is too high."""

    @property
    def final(self) -> bool:
        """Whether the weights have the zeros that they are to have in the end."""
        return True

    def before_step(self) -> None:
        """Nothing pulls at what is zero: neither Adam's averages nor its step may see it."""
        for name, mask in self.gone.items():
            gradient = self._values[name].grad
            if gradient is not None:
                gradient.mul_(~mask)  # a fifth of the time of masked_fill_ on a CPU

    def after_step(self, progress: float) -> None:
        """Exact zeros again, whatever step the optimizer took; a step that is no number ends the training.

        Args:
            progress: from 0 to 1, how much of the training is done.
        """
        with torch.no_grad():
            for name, mask in self.gone.items():
                self._values[name].mul_(~mask)

    def settle(self) -> None:
        """The training is over, and the best values are back: take their zeros for the mask."""

    def save(self, folder: Path) -> None:
        """Write what a run that is taken up needs beside its values."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""


def parameter_masks(sparse: list[Sparse], model: nn.Module) -> dict[str, Tensor]:
    """What must be zero, by parameter, each in the shape of its parameter.

    A parameter that several layers are parts of, as the experts of a mixture are, is masked by all of them.
    """
    masks: dict[str, Tensor] = {}
    for name in dict.fromkeys(one.layer.parameter_name for one in sparse):
        parameter = model.get_parameter(name)
        masks[name] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for one in sparse:
        view = like_weight(one.layer, masks[one.layer.parameter_name], model.get_parameter(one.layer.parameter_name))
        view.copy_(one.gone)
    return masks


def like_weight(layer: Layer, tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor, of the shape and layout of a layer's parameter, that is the layer's weight, (c, b)."""
    weight = layer.weight
    first = weight.storage_offset() - parameter.storage_offset()
    return tensor.as_strided(weight.shape, weight.stride(), tensor.storage_offset() + first)
