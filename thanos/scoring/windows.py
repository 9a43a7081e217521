"""Text cut into the windows that a perplexity is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thanos.checkpoint import max_length
from thanos.text import Beginning, beginning, check_bos, load_text, text_tokens, with_beginning

_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Windows:
    """Windows of a text that do not overlap.

    Attributes:
        tokens: (N, S), int64.
        front: how many tokens of each window stand in front of its text, so nothing predicts them; 0 where there is
            text only, whose first token nothing predicts either.
        source, sha256: of the text, see :class:`thanos.text.Text`; empty for bare token ids.
    """

    tokens: Tensor
    front: int
    source: str = ""
    sha256: str = ""

    @property
    def scored(self) -> int:
        """The predicted tokens of each window, its last ones."""
        return self.tokens.shape[1] - max(1, self.front)

    def record(self) -> dict[str, Any]:
        """What a report says of them."""
        count, length = self.tokens.shape
        return {"sha256": self.sha256, "sequence_length": length, "windows": count, "bos": self.front > 0}


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


def load_windows(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    windows: int | None = None,
    bos: str = "auto",
    text_field: str | None = None,
) -> Windows:
    """Read a text for evaluation and cut it: its documents joined by blank lines, tokenised once.

    Where models are used to a begin-of-sequence token, each window is that token and ``length`` - 1 tokens of text. A
    shorter rest at the end is dropped.

    Args:
        source: ``wikitext2`` (its test split), ``c4`` (1100 documents of its validation split), or another as for
            :func:`thanos.text.load_samples`.
        tokenizer: a Hugging Face tokenizer.
        length: S, the tokens in a window.
        windows: take only the first so many.
        bos: see :func:`thanos.text.beginning.beginning`.
        text_field: see :func:`thanos.text.load_samples`.

    Raises:
        ValueError: the source cannot be read or holds less than a window; a number or ``bos`` is out of its range.
    """
    begin = beginning(tokenizer, bos)
    text = load_text(source, "test", text_field=text_field, tokenizer=tokenizer)
    cut = _cut(text_tokens(text, tokenizer, begin), begin, length, windows)
    return Windows(cut, len(begin.tokens), text.source, text.sha256)


def cut_tokens(
    tokens: Tensor, config: Any, tokenizer: Any, length: int, *, windows: int | None = None, bos: str = "auto"
) -> Windows:
    """As :func:`load_windows`, of the token ids (T,) of a text.

    What stands in front of a window is the tokenizer's; without a tokenizer (None) it is, for ``auto``, the model's
    begin-of-sequence token where the ids start with it.

    Args:
        config: of the model.
    """
    begin = _of_config(tokens, config, bos) if tokenizer is None else beginning(tokenizer, bos)
    text = tokens[len(tokens) - len(begin.of_text(tokens.tolist())) :] if begin.dropped else tokens
    return Windows(_cut(text, begin, length, windows), len(begin.tokens))


def _of_config(tokens: Tensor, config: Any, bos: str) -> Beginning:
    check_bos(bos)
    token = getattr(config.get_text_config(), "bos_token_id", None)
    if not isinstance(token, int):
        if bos == "yes":
            raise ValueError("the model's configuration names no begin-of-sequence token; pass its tokenizer")
        return Beginning((), (), "")
    own = (token,) if bos == "yes" or token in tokens[:1] else ()
    return Beginning(() if bos == "no" else own, own, "")


def _cut(text: Tensor, begin: Beginning, length: int, windows: int | None) -> Tensor:
    """The windows (N, S) of the token ids (T,) of a text."""
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be at least 1, not {windows}")
    width = length - len(begin.tokens)
    if width < 1:
        raise ValueError(f"a window of {length} tokens has no room for text after what stands in front of it")
    if len(text) < width:
        share = f", of which {width} are text" if begin.tokens else ""
        raise ValueError(f"the text for perplexity holds {len(text)} tokens, less than one sequence of {length}{share}")
    count = min(len(text) // width, windows or len(text))
    return with_beginning(text[: count * width].view(count, width), begin)
