"""An experiment's results: one file, rewritten after every run, so that an interrupted experiment goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.experiments.registry import EXPERIMENTS
from benchmarks.experiments.run import Run
from benchmarks.records import Row, read, write


class Store:
    """The file ``NAME.jsonl`` of an experiment.

    It starts with what is there: its own records, and those of the same runs in experiments that measure them alike,
    with the same settings.

    Args:
        folder: of the results.
        name: of the experiment.
        command: that makes them.
        settings: of :class:`benchmarks.experiments.lab.Settings`.

    Raises:
        ValueError: a file is damaged, or the experiment's own was made with other settings.
    """

    def __init__(self, folder: Path, name: str, command: str, settings: dict[str, Any]) -> None:
        self._path, self._runs = folder / f"{name}.jsonl", EXPERIMENTS[name].runs
        self._head = {"command": command, "settings": settings}
        self._rows: dict[Run, list[Row]] = {}
        alike = [other for other in EXPERIMENTS if EXPERIMENTS[other].measure is EXPERIMENTS[name].measure]
        for other in sorted(alike, key=name.__eq__):  # its own records last: they count
            if (path := folder / f"{other}.jsonl").exists():
                found = read(path)
                if found.head.get("settings") == settings:
                    self._rows |= _by_run(found.rows)
                elif other == name:
                    raise ValueError(f"{path} was made with other settings: remove it, or pass another --output")

    def missing(self, zero_shot: bool) -> list[Run]:
        """The runs that have no record yet, or none with zero-shot accuracy where it is asked for."""

        def complete(run: Run) -> bool:
            rows = self._rows.get(run, [])
            return bool(rows) and (all("zero_shot" in row for row in rows) or not zero_shot or run.seed != 0)

        return [run for run in self._runs if not complete(run)]

    def add(self, rows: list[Row]) -> None:
        """Take in the records of a run, if any, and write the file, its records in the order of the runs."""
        self._rows |= _by_run(rows)
        write(self._path, self._head, [row for run in self._runs for row in self._rows.get(run, [])])


def _by_run(rows: list[Row]) -> dict[Run, list[Row]]:
    found: dict[Run, list[Row]] = {}
    for row in rows:
        found.setdefault(Run(**row["run"]), []).append(row)
    return found
