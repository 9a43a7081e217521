"""Weights that can be pruned: no NaN, no infinity."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from thanos.engine.factor import finite
from thanos.engine.timing import read
from thanos.walk.decoder import Layer


def check_finite(layers: Iterable[Layer]) -> None:
    """Raise ValueError, naming the layer, where a weight holds NaN or infinity."""
    flags_of: dict[torch.device, dict[str, Tensor]] = {}
    for layer in layers:
        flags_of.setdefault(layer.weight.device, {})[layer.name] = finite(layer.weight)
    for flags in flags_of.values():  # one wait for each device
        for name, flag in zip(flags, read(*flags.values()), strict=True):
            if not flag:
                raise ValueError(f"{name}: its weights hold NaN or infinity")
