"""Prints what each benchmark measured in units of a dense product, beside the number to reach; keeps JSON small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.recording import machine_info, slim


@dataclass
class Summary:
    """Rows of (name, value in GE, what to reach or None, share of SparseGPT's time or None), and sentences."""

    rows: list[tuple[str, float, float | None, float | None]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


_SUMMARY = pytest.StashKey[Summary]()


def _summary(config: pytest.Config) -> Summary:
    return config.stash.setdefault(_SUMMARY, Summary())


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    summary = _summary(config)
    if summary.rows:
        width = max(44, *(len(name) for name, *_ in summary.rows))
        terminalreporter.write_line("")
        terminalreporter.write_line(f"{'':{width}s}{'GE':>8s}{'to reach':>10s}{'/ SparseGPT':>13s}")
        for name, value, limit, ratio in summary.rows:
            reach = f"{limit:g}" if limit else "-"
            compared = f"{ratio:.2f}" if ratio else "-"
            terminalreporter.write_line(f"{name:{width}s}{value:8.2f}{reach:>10s}{compared:>13s}")
        terminalreporter.write_line("GE: the time of one dense c x b x b float32 product in the same run")
    for finding in summary.findings:
        terminalreporter.write_line(finding)


@pytest.fixture
def ge_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with (name, value in GE, what to reach or None, share of SparseGPT's time or None) to add a line."""
    rows = _summary(request.config).rows
    return lambda name, value, limit=None, ratio=None: rows.append((name, value, limit, ratio))


@pytest.fixture(scope="session")
def finding(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a sentence to print below the table."""
    return _summary(request.config).findings.append


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine_info()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    slim(output_json)
