"""The model card of a compact directory says how to load it, and is restored to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from thanos.compact.card import add_note, remove_note

FRONT = "---\nlicense: mit\n---\n\n"
CARDS = {
    "whole": f"{FRONT}# A model, pruned\n\nThis is it.\n",
    "no metadata": "# A model\n\ntext\n",
    "no title": f"{FRONT}text\n# later\n",
    "title at the end": "# A model",
    "windows": "\ufeff---\r\nlicense: mit\r\n---\r\n# A model\r\n\r\ntext\r\n",
    "open metadata": "---\nlicense: mit\n# A model\n",
    "spaces": "\n\n \n",
    "empty": "",
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_is_restored_to_the_byte(kind: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    text = CARDS[kind].encode()
    card.write_bytes(text)
    add_note(tmp_path)
    noted = card.read_bytes()
    assert b"from_pretrained(DIR)" in noted
    if FRONT in CARDS[kind]:
        assert noted.startswith(FRONT.encode())
    remove_note(tmp_path)
    assert card.read_bytes() == text
    remove_note(tmp_path)
    assert card.read_bytes() == text


def test_two_notes_are_taken_back_one_by_one(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes(CARDS["whole"].encode())
    add_note(tmp_path)
    once = card.read_bytes()
    add_note(tmp_path)
    remove_note(tmp_path)
    assert card.read_bytes() == once


def test_what_is_no_text_is_kept(tmp_path: Path) -> None:
    add_note(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00# odd\n")
    add_note(tmp_path)
    remove_note(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe\x00# odd\n"


def test_packing_notes_and_unpacking_restores(model_folder: Path, tmp_path: Path) -> None:
    from thanos.compact import pack, unpack

    card = model_folder / "README.md"
    card.write_text(CARDS["whole"])
    pack(model_folder, tmp_path / "compact")
    assert "compact form" in (tmp_path / "compact" / "README.md").read_text()
    unpack(tmp_path / "compact", tmp_path / "plain")
    assert (tmp_path / "plain" / "README.md").read_bytes() == card.read_bytes()
