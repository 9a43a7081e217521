"""Keeps the records of the benchmarks, and prints them in units of a dense product beside the number to reach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.machine import describe
from benchmarks.records import Row, keep, rounded


@dataclass
class Summary:
    """Records by suite, notes by their names, and sentences."""

    records: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


_SUMMARY = pytest.StashKey[Summary]()


def _summary(config: pytest.Config) -> Summary:
    return config.stash.setdefault(_SUMMARY, Summary())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="A folder whose SUITE.jsonl takes in the records.")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    summary, write = _summary(config), terminalreporter.write_line
    if rows := [row for suite in summary.records.values() for row in suite if "ge" in row]:
        told = [row["name"] + summary.notes[row["name"]] for row in rows]
        width = max(44, *map(len, told))
        write(f"\n{'':{width}s}{'GE':>8s}{'to reach':>10s}{'/ SparseGPT':>13s}")
        for name, row in zip(told, rows, strict=True):
            limit, ratio = row.get("limit_ge"), row.get("ratio_to_sparsegpt")
            reach, compared = f"{limit:g}" if limit else "-", f"{ratio:.2f}" if ratio else "-"
            write(f"{name:{width}s}{row['ge']:8.2f}{reach:>10s}{compared:>13s}")
        write("GE: the time of one dense c x b x b float32 product in the same run")
    for finding in summary.findings:
        write(finding)
    if folder := config.getoption("--results"):
        machine = describe()
        for suite, rows in summary.records.items():
            path = keep(folder / f"{suite}.jsonl", [{**rounded(row), "machine": machine} for row in rows])
            aside = f": {suite}.jsonl holds more, of another machine" if path.stem != suite else ""
            write(f"{len(rows)} records are in {path}{aside}")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it with a record's name, unique in its suite, and its fields; one with ``ge`` is printed, with a note."""
    summary, suite = _summary(request.config), request.path.stem.removeprefix("test_")

    def take(name: str, *, note: str = "", **fields: object) -> None:
        summary.records[suite].append({"name": name, **fields})
        summary.notes[name] = note

    return take


@pytest.fixture(scope="session")
def finding(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a sentence to print below the table."""
    return _summary(request.config).findings.append
