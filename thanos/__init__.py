"""Prune large language models after training: Thanos, SparseGPT, Wanda and magnitude in one engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos.engine.factor import Factor
from thanos.engine.layer import PrunedWeight, prune_group, prune_weight
from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured, parse_pattern

if TYPE_CHECKING:
    from thanos import pack, unpack
    from thanos.compact import load
    from thanos.walk.model import prune_model

__all__ = [
    "Factor",
    "Pattern",
    "PrunedWeight",
    "SemiStructured",
    "Structured",
    "Unstructured",
    "load",
    "pack",
    "parse_pattern",
    "prune_group",
    "prune_model",
    "prune_weight",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """What needs transformers, whose import takes seconds, is imported when it is first asked for."""
    if name in ("pack", "unpack"):
        return import_module(f"thanos.{name}")  # modules that can be called
    if name == "load":
        return import_module("thanos.compact.checkpoint").load
    if name == "prune_model":
        return import_module("thanos.walk.model").prune_model
    raise AttributeError(f"module 'thanos' has no attribute {name!r}")
