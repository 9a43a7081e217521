"""Prune large language models after training: Thanos, SparseGPT, Wanda and magnitude in one engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos.factor import Factor
from thanos.layer import PrunedWeight, prune_group, prune_weight
from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured, parse_pattern

if TYPE_CHECKING:
    from thanos.model import prune_model

_LATER = {"prune_model": "thanos.model"}  # these import transformers, which takes seconds

__all__ = [
    "Factor",
    "Pattern",
    "PrunedWeight",
    "SemiStructured",
    "Structured",
    "Unstructured",
    "parse_pattern",
    "prune_group",
    "prune_model",
    "prune_weight",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'thanos' has no attribute {name!r}")
