"""What the results folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Records, Row, read


@dataclass(frozen=True)
class Results:
    """All there is.

    Attributes:
        files: by name: experiments, suites, and those of :mod:`benchmarks.gpu`.
        findings: by the experiment's name, or ``speed``.
    """

    files: dict[str, Records]
    findings: dict[str, str]

    def of(self, name: str, kind: str | None = None) -> list[Row]:
        """The records of a file, of one kind; none where there is no file."""
        rows = self.files[name].rows if name in self.files else []
        return [row for row in rows if kind is None or row.get("kind") == kind]


def load(folder: Path) -> Results:
    """Read ``folder``, and the findings that lie beside it.

    Raises:
        ValueError: a file is damaged.
    """
    paths = [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith(".new")]
    texts = sorted((folder.parent / "findings").glob("*.md"))
    findings = {path.stem: path.read_text(encoding="utf-8").strip() for path in texts}
    return Results({path.stem: read(path) for path in paths}, findings)
