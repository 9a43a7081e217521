"""What is compared side by side is measured alike, and said as a ratio to the first."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.report.smaller import side_by_side_section


def test_one_turn_of_a_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PROMPT_TOKENS", 16)
    found = side_by_side.once(model_folder)
    assert found["decode"][0] > 0
    assert found["read"][0] > 0
    assert side_by_side.resident() > 10_000_000


def test_rows_are_told_by_their_ratio_to_the_first() -> None:
    turns = [
        {"decode": [100.0], "read": [1000.0], "resident": 3e9},
        {"decode": [300.0], "read": [1000.0], "resident": 1e9},
    ]
    first = side_by_side._row("dense bfloat16", Path(__file__), turns)
    assert first["decode"] == pytest.approx(5)
    assert first["resident"] == 2e9
    other = {**first, "name": "2:4 int8", "decode": 15.0}
    text = "\n".join(side_by_side_section([first, other]))
    assert "| 2:4 int8 |" in text
    assert "15.00 (3.00 x)" in text
