"""An experiment's results: one JSON file, rewritten after every run, so that an interrupted experiment goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.experiments.grid import Run

_OTHER_ROWS = {"outliers"}  # experiments whose rows are not those of pruned models


class Store:
    """The file ``NAME.json`` of an experiment.

    Args:
        folder: of the results.
        name: of the experiment.
        command: that makes them.
        settings: of :class:`benchmarks.experiments.runner.Settings`.

    Raises:
        ValueError: the file there was made with other settings.
    """

    def __init__(self, folder: Path, name: str, command: str, settings: dict[str, Any]) -> None:
        self._path = folder / f"{name}.json"
        self._head = {"experiment": name, "command": command, "settings": settings}
        self._rows: dict[str, dict[str, Any]] = {}
        self._folder = folder
        if self._path.exists():
            found = json.loads(self._path.read_text())
            if found["settings"] != settings:
                raise ValueError(f"{self._path} was made with other settings: remove it, or pass another --output")
            self._rows = {_key(row["run"]): row for row in found["rows"]}

    def missing(self, runs: list[Run], zero_shot: bool) -> list[Run]:
        """The runs that have no row yet, or none with zero-shot accuracy where it is asked for."""
        return [run for run in runs if not self._complete(self._rows.get(_key(run.to_dict())), run, zero_shot)]

    def borrow(self, runs: list[Run]) -> None:
        """Take rows of the same runs from other experiments with the same settings."""
        for path in sorted(self._folder.glob("*.json")):
            found = json.loads(path.read_text())
            others = _OTHER_ROWS & {found.get("experiment"), self._head["experiment"]}
            if found.get("settings") != self._head["settings"] or others:
                continue
            rows = {_key(row["run"]): row for row in found["rows"]}
            for run in runs:
                key = _key(run.to_dict())
                if key in rows:
                    self._rows.setdefault(key, rows[key])

    def add(self, row: dict[str, Any], runs: list[Run]) -> None:
        """Take in a row and write the file, its rows in the order of ``runs``."""
        self._rows[_key(row["run"])] = row
        self.write(runs)

    def write(self, runs: list[Run]) -> None:
        keys = [_key(run.to_dict()) for run in runs]
        rows = [self._rows[key] for key in keys if key in self._rows]
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({**self._head, "rows": rows}, indent=1) + "\n")
        os.replace(part, self._path)

    @staticmethod
    def _complete(row: dict[str, Any] | None, run: Run, zero_shot: bool) -> bool:
        return row is not None and not (zero_shot and run.seed == 0 and row.get("zero_shot") is None)


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)
