"""Model directories: how they are read, and how they are written whole or not at all."""

from thanos.checkpoint.reading import (
    DTYPES,
    check_unquantised,
    is_gguf,
    load_config,
    load_model,
    load_tokenizer,
    max_length,
    skeleton,
)
from thanos.checkpoint.writing import check_target, save_model, staged

__all__ = [
    "DTYPES",
    "check_target",
    "check_unquantised",
    "is_gguf",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_length",
    "save_model",
    "skeleton",
    "staged",
]
