"""Prune large language models after training: Thanos, SparseGPT, Wanda and magnitude in one engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos.engine.factor import Factor
from thanos.engine.layer import PrunedWeight, prune_group, prune_weight
from thanos.pattern import (
    Axis,
    Pattern,
    SemiStructured,
    Shrink,
    Structured,
    Unstructured,
    parse_any_pattern,
    parse_pattern,
)

if TYPE_CHECKING:
    from thanos import pack, unpack
    from thanos.loading import load
    from thanos.shrink import shrink_model
    from thanos.walk.model import prune_model

__all__ = [
    "Axis",
    "Factor",
    "Pattern",
    "PrunedWeight",
    "SemiStructured",
    "Shrink",
    "Structured",
    "Unstructured",
    "load",
    "pack",
    "parse_any_pattern",
    "parse_pattern",
    "prune_group",
    "prune_model",
    "prune_weight",
    "shrink_model",
    "unpack",
]


def __getattr__(name: str) -> Any:
    """What needs transformers, whose import takes seconds, is imported when it is first asked for."""
    if name in ("pack", "unpack"):
        return import_module(f"thanos.{name}")  # modules that can be called
    if name == "load":
        return import_module("thanos.loading").load
    if name == "shrink_model":
        return import_module("thanos.shrink").shrink_model
    if name == "prune_model":
        return import_module("thanos.walk.model").prune_model
    raise AttributeError(f"module 'thanos' has no attribute {name!r}")
