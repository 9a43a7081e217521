"""Damaged compact checkpoints are read or refused, never else (``python tools/fuzz_compact.py`` tries more)."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FUZZ = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "fuzz_compact.py"))


def test_damaged_checkpoints_are_read_or_refused() -> None:
    ends = FUZZ["fuzz"](400, 7)
    assert ends.total() == 400
    assert ends["FormatError"] > 100
    assert ends["read"] > 40


def test_another_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> str:
        raise IndexError("beyond")

    monkeypatch.setitem(FUZZ["fuzz"].__globals__, "try_one", fails)
    with pytest.raises(AssertionError, match=r"(?s)number 0 of seed 3, .*IndexError: beyond"):
        FUZZ["fuzz"](1, 3)
