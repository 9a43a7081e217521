"""Perplexity by the standard protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import max_length
from thanos.text import Text, load_text, tokenize
from thanos.walk.replay import run_model

_DEFAULT_LENGTH = 2048
_BATCH_TOKENS = 2048  # in the windows scored together
_ROWS = 512  # of logits turned into losses at a time: a large vocabulary's float32 copy stays small


def load_tokens(source: str | Path | Sequence[str], tokenizer: Any) -> Tensor:
    """Token ids (T,), int64, of a text for evaluation: its documents joined by blank lines, tokenised once.

    Args:
        source: ``wikitext2`` (its test split), ``c4`` (1100 documents of its validation split), ``builtin``, a .txt,
            .jsonl or .parquet file, or a list of documents.

    Raises:
        ValueError: the source cannot be read or is empty.
    """
    if isinstance(source, str | Path):
        return tokenize(load_text(source, "test"), tokenizer)
    return tokenize(Text(list(source), "documents", ""), tokenizer)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path | Sequence[str] | Tensor,
    *,
    sequence_length: int | None = None,
    windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """``exp`` of the mean loss per predicted token, over windows that do not overlap.

    The tokens are cut into windows of ``sequence_length``; each is scored by itself, its first token unpredicted; a
    shorter rest at the end is dropped.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer; may be None where ``source`` holds token ids.
        source: as for :func:`load_tokens`, or token ids (T,).
        sequence_length: 2048, or what the model takes, where that is less.
        windows: take only the first so many.
        progress: called with the windows done and their number.

    Raises:
        ValueError: the text is shorter than a window, or the windows are longer than the model takes.
    """
    length = window_length(model.config, sequence_length)
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, not {windows}")
    tokens = source if isinstance(source, Tensor) else load_tokens(source, tokenizer)
    check_windows(tokens, length)
    count = min(len(tokens) // length, windows or len(tokens))
    training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.inference_mode():
            done = 0
            for batch in tokens[: count * length].view(count, length).split(max(1, _BATCH_TOKENS // length)):
                for logits, window in zip(run_model(model, batch).logits, batch, strict=True):
                    total += _loss(logits, window)
                done += len(batch)
                if progress is not None:
                    progress(done, count)
    finally:
        model.train(training)
    return math.exp(total / (count * (length - 1)))


def window_length(config: Any, asked: int | None = None) -> int:
    """The length of a window in tokens: ``asked``, else 2048, or what a model of ``config`` takes, where that is less.

    Raises:
        ValueError: the model does not take as many.
    """
    limit = max_length(config)
    length = asked if asked is not None else min(_DEFAULT_LENGTH, limit or _DEFAULT_LENGTH)
    if length < 2 or (limit is not None and length > limit):
        takes = f"from 2 to the {limit} tokens the model takes" if limit else "at least 2"
        raise ValueError(f"the sequence length must be {takes}, not {length}")
    return length


def check_windows(tokens: Tensor, length: int) -> None:
    """Raise ValueError unless the tokens fill a window."""
    if len(tokens) < length:
        raise ValueError(f"the text for perplexity holds {len(tokens)} tokens, less than one sequence of {length}")


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """The summed loss of predicting tokens 1, 2, ... from the logits (S, V) before them."""
    total = 0.0
    for rows, targets in zip(logits[:-1].split(_ROWS), tokens[1:].split(_ROWS), strict=True):
        total += float(nn.functional.cross_entropy(rows.float(), targets.to(rows.device), reduction="sum"))
    return total
