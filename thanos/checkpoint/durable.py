"""Files that survive a crash: written whole, and on the disk before anything says that they are there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """The same for all that is in a directory."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON; whatever happens, it holds the old value or the new one."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, path)
    sync(path.parent)


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Within the body, a disk that is full is an error with a sentence that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"the disk is full: there is no room left to write in {folder}") from error
