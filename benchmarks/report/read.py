"""What the results folder holds, checked for shape."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.grid import EXPERIMENTS

Row = dict[str, Any]
SUITES = ("layer", "scaling", "ops", "sparse", "model")


@dataclass(frozen=True)
class Experiment:
    """One experiment's file.

    Attributes:
        command: that makes it.
        settings: what all its runs share.
        rows: one for each run.
        planned: how many runs the experiment has.
    """

    command: str
    settings: Row
    rows: list[Row]
    planned: int


@dataclass(frozen=True)
class Suite:
    """One pytest-benchmark file: the machine and each benchmark's ``extra_info``."""

    machine: Row
    records: list[Row]

    def of(self, kind: str, **fields: object) -> list[Row]:
        """The records of a kind with these fields."""
        return [r for r in self.records if r.get("kind") == kind and all(r.get(k) == v for k, v in fields.items())]


@dataclass(frozen=True)
class Results:
    """All there is; what has no file is missing from the mappings.

    Attributes:
        experiments, suites: by name.
        gpus: the reports of :mod:`benchmarks.gpu`, in the order of their file names.
        findings: by the experiment's name, or ``speed``.
    """

    experiments: dict[str, Experiment]
    suites: dict[str, Suite]
    gpus: list[Row]
    findings: dict[str, str]


def load(folder: Path) -> Results:
    """Read ``folder``, and the findings that lie beside it.

    Raises:
        ValueError: a file is damaged.
    """
    experiments, suites = {}, {}
    for name in EXPERIMENTS:
        if (path := folder / f"{name}.json").exists():
            found = _read(path, "rows")
            _check(path, "run", found["rows"])
            planned = len(EXPERIMENTS[name]())
            experiments[name] = Experiment(found["command"], found["settings"], found["rows"], planned)
    for name in SUITES:
        if (path := folder / f"{name}.json").exists():
            found = _read(path, "benchmarks")
            _check(path, "extra_info", found["benchmarks"])
            records = [one["extra_info"] for one in found["benchmarks"]]
            suites[name] = Suite(found.get("machine_info", {}), records)
    gpus = [_read(path, "layers", "models") for path in sorted(folder.glob("gpu*.json"))]
    texts = sorted((folder.parent / "findings").glob("*.md"))
    return Results(experiments, suites, gpus, {path.stem: path.read_text(encoding="utf-8").strip() for path in texts})


def _read(path: Path, *lists: str) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it and make it again") from None
    needed = [*lists, *(("command", "settings") if "rows" in lists else ())]
    for key in needed:
        if not isinstance(found, dict) or key not in found or (key in lists and not isinstance(found[key], list)):
            raise ValueError(f"{path} has no {key!r} where it must: remove it and make it again")
    return found


def _check(path: Path, key: str, entries: Iterable[Any]) -> None:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), dict):
            raise ValueError(f"{path}: entry {position} has no {key!r}: remove the file and make it again")
