"""Model directories: how they are read, and how they are written whole or not at all."""

from thanos.checkpoint.blocks import save_without_blocks
from thanos.checkpoint.conversion import Target, can_convert, fill, targets
from thanos.checkpoint.durable import room_for, sync, sync_tree
from thanos.checkpoint.fingerprint import fingerprint
from thanos.checkpoint.partial import Partial
from thanos.checkpoint.reading import (
    DTYPES,
    auto_class,
    check_floating,
    check_nothing_left_out,
    check_unquantised,
    empty_model,
    is_gguf,
    load_config,
    load_model,
    load_tokenizer,
    max_length,
    quantisation,
    to_one_dtype,
)
from thanos.checkpoint.skeleton import BlockFiles, load_skeleton
from thanos.checkpoint.source import source_folder
from thanos.checkpoint.update import (
    INDEX,
    Patches,
    prepare,
    save_pruned,
    save_smaller,
    updates_source,
    weight_files,
    write_index,
)
from thanos.checkpoint.writing import check_target, save_model, staged

__all__ = [
    "DTYPES",
    "INDEX",
    "BlockFiles",
    "Partial",
    "Patches",
    "Target",
    "auto_class",
    "can_convert",
    "check_floating",
    "check_nothing_left_out",
    "check_target",
    "check_unquantised",
    "empty_model",
    "fill",
    "fingerprint",
    "is_gguf",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "max_length",
    "prepare",
    "quantisation",
    "room_for",
    "save_model",
    "save_pruned",
    "save_smaller",
    "save_without_blocks",
    "source_folder",
    "staged",
    "sync",
    "sync_tree",
    "targets",
    "to_one_dtype",
    "updates_source",
    "weight_files",
    "write_index",
]
