"""Documents from the hub, a file or Python's own documentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from thanos.text.json_lines import json_lines

NAMES = ("c4", "wikitext2", "builtin")
_C4_DOCUMENTS = {"train": 20_000, "validation": 1_100}  # the first ones of the split's first file


@dataclass(frozen=True)
class Text:
    """Documents and where they came from.

    Attributes:
        documents: at least one, none of them empty.
        source: the name or the path that was asked for.
        sha256: of a local file's bytes; else of the documents, joined by blank lines, in UTF-8.
    """

    documents: list[str]
    source: str
    sha256: str

    def joined(self) -> str:
        """The documents, joined by blank lines."""
        return "\n\n".join(self.documents)


def check_source(source: str | Path) -> None:
    """Refuse a source that is neither a known name nor a file of a known kind, without reading it.

    Raises:
        ValueError: so it is.
    """
    if str(source) in NAMES:
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{source} is neither one of {', '.join(NAMES)} nor a file")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{source} is not one of the kinds of text file that are read: {', '.join(_READERS)}")


def load_text(source: str | Path | Sequence[str], split: str) -> Text:
    """Read a text.

    Args:
        source: as for :func:`load_samples`; a list of documents is the same for both splits.
        split: ``train``, or ``test`` for what calibration does not see; a file is the same for both.

    Raises:
        ValueError: the source cannot be read or is empty.
    """
    if isinstance(source, str | Path):
        check_source(source)
    name, digest = str(source), None
    if not isinstance(source, str | Path):
        name, documents = "the list of documents", list(source)
    elif name == "builtin":
        documents = _builtin(split)
    elif name in NAMES:
        documents = _from_hub(name, split)
    else:
        documents, digest = _from_file(Path(source))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{name} holds no text")
    text = Text(documents, name, digest or "")
    return text if digest else Text(documents, name, hashlib.sha256(text.joined().encode()).hexdigest())


def _builtin(split: str) -> list[str]:
    """Python's documentation of its language; every fourth topic is for tests."""
    from pydoc_data.topics import topics

    return [topics[name] for index, name in enumerate(sorted(topics)) if (index % 4 == 0) == (split == "test")]


def _from_hub(name: str, split: str) -> list[str]:
    import datasets

    try:
        if name == "wikitext2":
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
            return [row["text"] for row in rows]
        part = "train" if split == "train" else "validation"
        file = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
        rows = datasets.load_dataset("allenai/c4", data_files=file[part], split="train", streaming=True)
        return [row["text"] for row in rows.take(_C4_DOCUMENTS[part])]
    except Exception as error:  # from the network, the hub or the cache
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"cannot read {name} from the Hugging Face hub ({reason}); pass a local file or 'builtin' instead"
        ) from error


def _from_file(path: Path) -> tuple[list[str], str]:
    try:
        content = path.read_bytes()
        documents = list(_READERS[path.suffix.lower()](path, content))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return documents, hashlib.sha256(content).hexdigest()


def _read_text(path: Path, content: bytes) -> Iterator[str]:
    yield content.decode("utf-8-sig").replace("\r\n", "\n")


def _read_lines(path: Path, content: bytes) -> Iterator[str]:
    for number, record in json_lines(path, content):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f"{path}, line {number}, has no field 'text' that holds a string")
        yield record["text"]


def _read_parquet(path: Path, content: bytes) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(content))
        names = table.schema_arrow.names
        column = table.read(columns=["text"]).column("text").to_pylist() if "text" in names else None
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    if column is None or not all(isinstance(value, str) for value in column):
        raise ValueError(f"{path} has no column 'text' of strings; its columns are {', '.join(names) or 'none'}")
    yield from column


_READERS: dict[str, Callable[[Path, bytes], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_lines,
    ".parquet": _read_parquet,
}
