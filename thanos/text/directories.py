"""Documents from a file, or from a directory: a data set saved by ``datasets``, or files, whose splits it knows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thanos.text.fields import Fields
from thanos.text.files import column, is_readable, kinds, read_documents, rows
from thanos_kernels.errors import first_line

_SAVED = ("dataset_dict.json", "state.json")  # in what datasets' save_to_disk writes
_SPLITS = {"train": ("train", "validation", "test"), "test": ("test", "validation", "train")}  # whichever is there


def from_file(path: Path, fields: Fields) -> tuple[list[str], str]:
    """The documents of a file and the SHA-256 of its bytes.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return list(read_documents(path, content, fields)), hashlib.sha256(content).hexdigest()


def from_directory(path: Path, split: str, fields: Fields) -> list[str]:
    """The documents of a directory: of its split for ``split``, where it has several.

    Raises:
        ValueError: it cannot be read, or holds nothing that is.
    """
    if any((path / name).is_file() for name in _SAVED):
        return _saved(path, split, fields)
    documents: list[str] = []
    for file in _files(path, split):
        if not is_readable(file):
            raise ValueError(f"{file} is not one of the kinds of text file that are read: {kinds()}")
        documents += from_file(file, fields)[0]
    return documents


def _saved(path: Path, split: str, fields: Fields) -> list[str]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError:  # of a data set without rows
        return []
    except Exception as error:  # whatever a damaged data set makes it raise
        raise ValueError(f"cannot read the data set saved in {path}: {first_line(error)}") from error
    data = _of_split(loaded, split) if isinstance(loaded, Mapping) else loaded
    name = column(str(path), data.column_names, fields)
    return list(fields.documents(str(path), rows(name, (row[name] for row in data.select_columns([name])))))


def _files(path: Path, split: str) -> list[Path]:
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:  # an empty directory, one of another kind of data, a damaged README
        raise ValueError(f"the directory {path} holds no text that is read: {first_line(error)}") from error
    return [Path(file) for file in _of_split(found, split)]


def _of_split(splits: Mapping[str, Any], split: str) -> Any:
    """The split to take; any where they have other names."""
    by_name = {str(name): data for name, data in splits.items()}
    return next((by_name[name] for name in _SPLITS[split] if name in by_name), next(iter(by_name.values())))
