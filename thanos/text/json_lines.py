"""JSON, one value a line."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and its value.

    Args:
        path: where ``content``, UTF-8, comes from; for errors.

    Raises:
        ValueError: a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(content.removeprefix(BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"cannot read {path}, line {number}: {error}; save it as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        yield number, value
