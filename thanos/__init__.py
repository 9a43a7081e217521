"""Prune large language models after training: Thanos, SparseGPT, Wanda and magnitude in one engine."""

from thanos.factor import Factor
from thanos.layer import PrunedWeight, prune_group, prune_weight
from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured, parse_pattern

__all__ = [
    "Factor",
    "Pattern",
    "PrunedWeight",
    "SemiStructured",
    "Structured",
    "Unstructured",
    "parse_pattern",
    "prune_group",
    "prune_weight",
]
