"""Result files: JSON, one record a line; the first line holds what all records share, such as their machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Records(NamedTuple):
    """A file: its first line without the machine, and its records, each with its ``machine``."""

    head: Row
    rows: list[Row]


def read(path: Path) -> Records:
    """What the file holds.

    Raises:
        ValueError: a line is not a JSON object.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}): remove the file and make it again") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} has a line that is not a JSON object: remove the file and make it again")
    head, *rows = lines
    machine = {"machine": head.pop("machine", {})}
    return Records(head, [machine | row for row in rows])


def write(path: Path, head: Row, rows: list[Row]) -> None:
    """Replace the file at once; records of one machine name it in the first line."""
    alike = rows and all(row["machine"] == rows[0]["machine"] for row in rows)
    shared = {"machine": rows[0]["machine"]} if alike else {}
    lines = [head | shared, *({key: row[key] for key in row if key not in shared} for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, path)


def keep(path: Path, rows: list[Row]) -> Path:
    """Put new records into their file, each in the place of the one with its ``name``, and say which file it was.

    Records of another machine replace the file if they hold all of its names. If not, they go to a file beside it,
    ``NAME.new.jsonl``, for a table of two machines compares nothing.
    """
    new = {row["name"]: row for row in rows}
    old = read(path).rows if path.exists() else []
    if any(row["machine"] != rows[0]["machine"] for row in old if row["name"] not in new):
        path, old = path.with_suffix(".new.jsonl"), []
    write(path, {}, [*(new.pop(row["name"], row) for row in old), *new.values()])
    return path


def rounded(value: Any) -> Any:
    """Floats to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value
