"""Prints what each benchmark measured in units of a dense product, beside the number it must reach."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = getattr(config, "ge_rows", [])
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{'':44s}{'GE':>7s}{'to reach':>10s}")
        for name, value, limit in rows:
            reach = f"{limit:g}" if limit else "-"
            terminalreporter.write_line(f"{name:44s}{value:7.2f}{reach:>10s}")
        terminalreporter.write_line("GE: the time of one dense c x b x b float32 product in the same run")


@pytest.fixture
def ge_row(request: pytest.FixtureRequest):
    """Call it with (name, value in GE, what to reach or None) to add a line to the summary."""
    rows: list[tuple[str, float, float | None]] = getattr(request.config, "ge_rows", [])
    request.config.ge_rows = rows  # type: ignore[attr-defined]
    return lambda name, value, limit=None: rows.append((name, value, limit))
