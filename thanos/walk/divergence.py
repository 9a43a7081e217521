"""How far a model's output is from the dense model's."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 512  # of logits compared at a time


def divergence(wanted: Tensor, found: Tensor) -> float:
    """The mean over tokens of ``KL(wanted || found)``, in nats; both (S, V) logarithms of probabilities."""
    total = 0.0
    for one, other in zip(wanted.split(_ROWS), found.split(_ROWS), strict=True):
        one, other = one.float(), other.float()
        total += float((one.exp() * (one - other)).sum(dtype=torch.float64))
    return total / len(wanted)
