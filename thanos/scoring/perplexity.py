"""Perplexity by the standard protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.peers import ALONE, Peers
from thanos.scoring.windows import Windows, cut_tokens, load_windows, window_length
from thanos.text import load_text, tokenize
from thanos.walk.replay import run_model

_BATCH_TOKENS = 2048  # in the windows scored together
_ROWS = 512  # of logits turned into losses at a time: a large vocabulary's float32 copy stays small


def load_tokens(
    source: str | Path | Sequence[str], tokenizer: Any, bos: str = "auto", *, text_field: str | None = None
) -> Tensor:
    """Token ids (T,), int64, of a text for evaluation: its documents joined by blank lines, tokenised once.

    They start with what stands in front of a text, where anything does.

    Args:
        source, bos, text_field: as for :func:`thanos.scoring.windows.load_windows`.

    Raises:
        ValueError: the source cannot be read or is empty.
    """
    return tokenize(load_text(source, "test", text_field=text_field, tokenizer=tokenizer), tokenizer, bos)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    source: str | Path | Sequence[str] | Tensor,
    *,
    sequence_length: int | None = None,
    windows: int | None = None,
    bos: str = "auto",
    text_field: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """``exp`` of the mean loss per predicted token, over windows that do not overlap.

    The tokens are cut into windows of ``sequence_length``, and each is scored by itself; a shorter rest at the end is
    dropped. Where the tokenizer puts a begin-of-sequence token in front of a text, every window is that token and
    ``sequence_length`` - 1 tokens of text, all of which are predicted, the first from the token in front of it.
    Otherwise a window is text alone, and its first token is not predicted. Either way the mean is over
    ``sequence_length`` - 1 tokens of each window.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer; may be None where ``source`` holds token ids.
        source: as for :func:`load_tokens`, or token ids (T,).
        sequence_length: 2048, or what the model takes, where that is less.
        windows: take only the first so many.
        bos: whether windows start with the begin-of-sequence token, see :func:`thanos.text.beginning.beginning`.
            Without a tokenizer, ``auto`` is whether the ids start with the model's.
        text_field: of the records of a file or data set, see :func:`thanos.text.load_samples`.
        progress: called with the windows done and their number.

    Raises:
        ValueError: the text is shorter than a window, or the windows are longer than the model takes; ``bos`` is
            ``yes`` and there is no such token.
    """
    config: Any = model.config
    length = window_length(config, sequence_length)
    if isinstance(source, Tensor):
        cut = cut_tokens(source, config, tokenizer, length, windows=windows, bos=bos)
    else:
        cut = load_windows(source, tokenizer, length, windows=windows, bos=bos, text_field=text_field)
    return score_windows(model, cut, progress=progress)


def score_windows(
    model: nn.Module,
    windows: Windows,
    *,
    progress: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> float:
    """The perplexity of ``model`` on windows of text, see :func:`perplexity`; ``peers`` share out the windows."""
    count = len(peers.share(windows.tokens))
    training = model.training
    model.eval()
    total = 0.0
    try:
        with torch.inference_mode():
            done = 0
            for batch in batches(windows, peers):
                for logits, window in zip(run_model(model, batch).logits, batch, strict=True):
                    total += loss(logits, window, windows.scored)
                done += len(batch)
                if progress is not None:
                    progress(done, count)
    finally:
        model.train(training)
    return of_all(total, windows, peers)


def of_all(total: float, windows: Windows, peers: Peers) -> float:
    """The perplexity from the summed loss of this process' windows."""
    return math.exp(sum(peers.objects(total)) / (len(windows.tokens) * windows.scored))


def batches(windows: Windows, peers: Peers = ALONE) -> list[Tensor]:
    """This process' windows, those that are scored together in one tensor."""
    own = peers.share(windows.tokens)
    return list(own.split(max(1, _BATCH_TOKENS // own.shape[1]))) if len(own) else []


def loss(logits: Tensor, tokens: Tensor, scored: int) -> float:
    """The summed loss of predicting the last ``scored`` tokens of a window from the logits (S, V) before them."""
    total = 0.0
    before, predicted = logits[-scored - 1 : -1], tokens[-scored:]
    for rows, targets in zip(before.split(_ROWS), predicted.split(_ROWS), strict=True):
        total += float(nn.functional.cross_entropy(rows.float(), targets.to(rows.device), reduction="sum"))
    return total
