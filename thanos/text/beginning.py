"""What stands in front of every window of text: the tokens that a model is used to see first, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOS = ("auto", "yes", "no")
_PROBE = "0"  # any text that every tokenizer knows


@dataclass(frozen=True)
class Beginning:
    """The tokens in front of every window, and those that are not taken for text.

    Attributes:
        tokens: in front of every window; none where a model is to see text alone. Most often it is one, but GLM's
            tokenizers put two in front of a text.
        dropped: where a text starts with these, by the tokenizer or by itself, they are taken off, so that a window
            never has them twice.
        text: how ``dropped`` is written.
    """

    tokens: tuple[int, ...]
    dropped: tuple[int, ...]
    text: str

    def of_text(self, ids: Sequence[int]) -> Sequence[int]:
        """The token ids of a text without those that are not its own."""
        first, width = 0, len(self.dropped)
        while width and tuple(ids[first : first + width]) == self.dropped:
            first += width
        return ids[first:]

    def of_document(self, document: str) -> str:
        """A document without what marks its beginning, which would otherwise stand in the middle of a joined text."""
        while self.text and document.startswith(self.text):
            document = document[len(self.text) :]
        return document


def beginning(tokenizer: Any, bos: str = "auto") -> Beginning:
    """What stands in front of every window.

    Args:
        tokenizer: a Hugging Face tokenizer.
        bos: ``auto``, what the tokenizer itself puts in front of a text, found by tokenising one; ``yes``, that or else
            its begin-of-sequence token; ``no``, nothing.

    Raises:
        ValueError: ``bos`` is none of these, or ``yes`` and the tokenizer has no such token.
    """
    check_bos(bos)
    own = _put_in_front(tokenizer)
    if bos == "yes" and not own:
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            raise ValueError(
                "bos cannot be yes: the tokenizer has no begin-of-sequence token to put in front of a text"
            )
        own = (int(token),)
    return Beginning(() if bos == "no" else own, own, tokenizer.decode(list(own)) if own else "")


def check_bos(bos: str) -> None:
    """Raise ValueError unless ``bos`` is one of :data:`BOS`."""
    if bos not in BOS:
        raise ValueError(f"bos must be one of {', '.join(BOS)}, not {bos!r}")


def _put_in_front(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that the tokenizer puts in front of a text."""
    whole = list(tokenizer(_PROBE)["input_ids"])
    try:
        text = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    except TypeError:  # a tokenizer that knows of no special tokens
        return ()
    for first in range(len(whole) - len(text) + 1):
        if whole[first : first + len(text)] == text:
            return tuple(whole[:first])
    return ()
