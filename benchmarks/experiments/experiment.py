"""What an experiment is. A new one is a module here that makes one, and a line in ``registry.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.experiments.lab import Lab, scored
from benchmarks.experiments.run import Run
from benchmarks.records import Records, Row
from benchmarks.report.groups import COLUMNS, Column, Group, groups
from benchmarks.report.markdown import table

Section = Callable[[Records], list[str]]


@dataclass(frozen=True)
class Experiment:
    """Runs, how they are measured, and what the page says of them.

    Attributes:
        runs: in the order of their records.
        sections: of the page, by heading.
        picture: of the first section, in :data:`benchmarks.report.page.PICTURES`.
        measure: one run; it returns the fields of its records.
        zero_shot: whether the runs of the first seed are scored by lm-eval too.
    """

    runs: list[Run]
    sections: dict[str, Section]
    picture: str | None = None
    measure: Callable[[Lab, Run, bool], list[Row]] = scored
    zero_shot: bool = False


def tabled(text: str, *columns: str | tuple[str, Column]) -> Section:
    """A section with a row for each group of runs that differ in the seed alone.

    Args:
        text: above the table.
        columns: names in :data:`benchmarks.report.groups.COLUMNS`, or a heading and what stands below it.
    """
    return lambda found: [text, grouped(groups(found.rows), *columns)]


def grouped(rows: Iterable[Group], *columns: str | tuple[str, Column]) -> str:
    """The table alone."""
    chosen = [(column, COLUMNS[column]) if isinstance(column, str) else column for column in columns]
    return table([name for name, _ in chosen], [[cell(row) for _, cell in chosen] for row in rows])
