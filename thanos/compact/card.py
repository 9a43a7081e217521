"""The model card of a compact directory: it says how the directory is loaded, and goes back to the byte."""

from __future__ import annotations

import re
from pathlib import Path

_CARD = "README.md"
# Behind the metadata and the title.
_PLACE = re.compile(rb"\A(?:\xef\xbb\xbf)?(?:---[ \t]*\r?\n.*?\r?\n---[ \t]*\r?\n)?\s*(?:# [^\n]*\n)?", re.DOTALL)
_OPENING, _CLOSING = b"<!-- thanos-compact -->\n", b"<!-- /thanos-compact -->\n\n"
_NOTE = b"""<!-- thanos-compact -->

> **This is the compact form.** What was pruned takes no room, on disk or in memory. Thanos must be imported to load it:
>
> ```python
> import thanos
> from transformers import AutoModelForCausalLM
>
> model = AutoModelForCausalLM.from_pretrained(DIR)
> ```
>
> `python -m thanos.unpack DIR --output ORDINARY` gives back the ordinary checkpoint, which the rest describes.

<!-- /thanos-compact -->

"""


def add_note(folder: Path) -> None:
    """Say in the card in ``folder``, if there is one, that it is of a compact directory."""
    card = folder / _CARD
    if card.is_file():
        before, after = _cut(card.read_bytes())
        card.write_bytes(before + _NOTE + after)


def remove_note(folder: Path) -> None:
    """Make the card in ``folder`` what it was before :func:`add_note`; one without its note stays as it is."""
    card = folder / _CARD
    if card.is_file():
        before, after = _cut(card.read_bytes())
        note, closing, rest = after.partition(_CLOSING)  # whatever it says between, in another version
        if note.startswith(_OPENING) and closing:
            card.write_bytes(before + rest)


def _cut(text: bytes) -> tuple[bytes, bytes]:
    """The card up to the place of the note, and the rest."""
    found = _PLACE.match(text)
    end = found.end() if found else 0
    return text[:end], text[end:]
