"""The model card of a compact directory: it says how the directory is loaded, and goes back to the byte."""

from __future__ import annotations

import re
from pathlib import Path

_CARD = "README.md"
# Behind the metadata and the title.
_PLACE = re.compile(rb"\A(?:\xef\xbb\xbf)?(?:---[ \t]*\r?\n.*?\r?\n---[ \t]*\r?\n)?\s*(?:# [^\n]*\n)?", re.DOTALL)
_NOTE = b"""<!-- thanos-compact -->

> **This is the compact form.** What was pruned takes no room, on disk or in memory. Thanos loads it, not as below:
>
> ```python
> import thanos
>
> model = thanos.load(DIR)
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
        if after.startswith(_NOTE):
            card.write_bytes(before + after.removeprefix(_NOTE))


def _cut(text: bytes) -> tuple[bytes, bytes]:
    """The card up to the place of the note, and the rest."""
    found = _PLACE.match(text)
    end = found.end() if found else 0
    return text[:end], text[end:]
