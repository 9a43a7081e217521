"""Prune large language models after training: Thanos, SparseGPT, Wanda and magnitude in one engine."""

# ruff: noqa: E402
from thanos.threads import wait_briefly  # isort: skip

wait_briefly()  # PyTorch reads it when it is loaded, by what comes next

from importlib import import_module
from typing import TYPE_CHECKING, Any

from thanos.engine.factor import Factor, factorise
from thanos.engine.layer import PrunedWeight, prune_group, prune_weight
from thanos.loading import register
from thanos.options import Options
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
    from thanos.compact import pack, unpack
    from thanos.loading import load
    from thanos.recover.model import recover_model
    from thanos.recover.options import RecoverOptions
    from thanos.scoring.perplexity import perplexity
    from thanos.scoring.zeroshot import zero_shot
    from thanos.shrink import shrink_model
    from thanos.text import load_samples
    from thanos.walk.model import prune_model

__all__ = [
    "Axis",
    "Factor",
    "Options",
    "Pattern",
    "PrunedWeight",
    "RecoverOptions",
    "SemiStructured",
    "Shrink",
    "Structured",
    "Unstructured",
    "factorise",
    "load",
    "load_samples",
    "pack",
    "parse_any_pattern",
    "parse_pattern",
    "perplexity",
    "prune_group",
    "prune_model",
    "prune_weight",
    "recover_model",
    "shrink_model",
    "unpack",
    "zero_shot",
]

register()

# What needs transformers, whose import takes seconds, is imported when it is first asked for.
_LATER = {
    "load": "thanos.loading",
    "load_samples": "thanos.text",
    "pack": "thanos.compact",
    "perplexity": "thanos.scoring.perplexity",
    "prune_model": "thanos.walk.model",
    "RecoverOptions": "thanos.recover.options",
    "recover_model": "thanos.recover.model",
    "shrink_model": "thanos.shrink",
    "unpack": "thanos.compact",
    "zero_shot": "thanos.scoring.zeroshot",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("thanos-pruning")
    raise AttributeError(f"module 'thanos' has no attribute {name!r}")
