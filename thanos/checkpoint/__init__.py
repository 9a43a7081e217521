"""Model directories: how they are read, and how they are written whole or not at all."""

from thanos.checkpoint.reading import (
    DTYPES,
    auto_class,
    check_unquantised,
    is_gguf,
    load_config,
    load_model,
    load_tokenizer,
    max_length,
    skeleton,
)
from thanos.checkpoint.source import source_folder
from thanos.checkpoint.update import save_pruned, save_smaller
from thanos.checkpoint.writing import check_target, save_model, staged

__all__ = [
    "DTYPES",
    "auto_class",
    "check_target",
    "check_unquantised",
    "is_gguf",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_length",
    "save_model",
    "save_pruned",
    "save_smaller",
    "skeleton",
    "source_folder",
    "staged",
]
