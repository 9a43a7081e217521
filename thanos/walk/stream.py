"""Whether a model is streamed from its files, and how it gets there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thanos.checkpoint import BlockFiles, can_convert, load_skeleton, weight_files
from thanos.walk.decoder import find_decoder
from thanos.walk.memory import available_memory

STREAM = ("auto", "yes", "no")
_SHARE = 0.5  # of the free memory that a model may take


def choose_stream(wanted: str, source: Path | None, copies: int = 1) -> tuple[bool, str]:
    """Whether to stream a model, and why, for users.

    Args:
        wanted: ``auto``, ``yes`` or ``no``.
        source: its directory; None for a GGUF file.
        copies: how many processes on this machine would each hold it.
    """
    if wanted != "auto":
        return wanted == "yes", "as asked for"
    files = [] if source is None else weight_files(source)
    if not files or not can_convert():
        return False, "its files can only be read as a whole"
    size, free = copies * sum(file.stat().st_size for file in files), available_memory(torch.device("cpu"))
    gib = f"it takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return size > _SHARE * free, gib


def load_streamed(model: str, dtype: torch.dtype | None = None, **options: Any) -> tuple[Any, BlockFiles]:
    """A model without its decoder blocks, and the files that hold them, see :func:`load_skeleton`."""
    return load_skeleton(model, lambda skeleton: find_decoder(skeleton).blocks, dtype, **options)
