"""What plain output says while a long text is scored."""

from __future__ import annotations

import pytest
from rich.console import Console

from thanos.commands import display as progress


def said(monkeypatch: pytest.MonkeyPatch, seconds: list[float], calls: list[tuple[int, int]]) -> list[str]:
    """The lines after calls at these times; the first time is that of the display's beginning."""
    clock = iter([seconds[0], *seconds])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    console = Console(record=True, width=200, force_terminal=False)
    with progress.display(console) as shown:
        for done, windows in calls:
            shown.window_scored(done, windows)
    return console.export_text().splitlines()


def test_a_short_text_is_scored_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [0, 20, 59], [(1, 2), (2, 2)]) == []


def test_a_long_text_says_once_a_minute_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, [0, 50, 70, 80, 140], [(5, 20), (7, 20), (8, 20), (14, 20)])
    assert [line.split(";")[0] for line in lines] == ["perplexity: window 7/20", "perplexity: window 14/20"]
    assert "2:20 passed, 1:00 left" in lines[1]


def test_another_text_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, [0, 70, 80, 150], [(9, 9), (1, 9), (3, 9)])
    assert len(lines) == 2
    assert "1:10 passed" in lines[1]
