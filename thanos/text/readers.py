"""Documents from the hub, a list, a file, a directory or Python's own documentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.text.directories import from_directory, from_file
from thanos.text.fields import Fields
from thanos.text.files import is_readable, kinds
from thanos_kernels.errors import first_line

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
    """Refuse a source that is neither a known name, nor a file of a known kind, nor a directory, without reading it.

    Raises:
        ValueError: the source is none of these.
    """
    path = Path(source)
    if str(source) in NAMES:
        return
    if not str(source):
        raise ValueError(f"a text is one of {', '.join(NAMES)}, a file or a directory, and its name is not empty")
    neither = f"{source} is neither one of {', '.join(NAMES)} nor a file"
    try:
        is_directory = path.is_dir()
        if is_directory and not any(path.iterdir()):
            raise ValueError(f"{neither}, and as a directory it is empty")
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error}") from error
    if is_directory:
        return
    if not path.is_file():
        raise ValueError(f"{neither} or a directory")
    if not is_readable(path):
        raise ValueError(f"{source} is not one of the kinds of text file that are read: {kinds()}")


def load_text(
    source: str | Path | Sequence[str], split: str, *, text_field: str | None = None, tokenizer: Any = None
) -> Text:
    """Read a text.

    Args:
        source: as for :func:`thanos.text.load_samples`.
        split: ``train``, or ``test`` for what calibration does not see; a file or a list is the same for both, and so
            is a directory in which ``datasets`` finds no such split.
        text_field: of records; None takes ``text``, or else a chat in ``messages`` or ``conversations``.
        tokenizer: whose chat template writes chats.

    Raises:
        ValueError: the source cannot be read or is empty.
        TypeError: it is nothing that could be a text.
    """
    fields = Fields(text_field, tokenizer)
    name, digest = str(source), None
    if not isinstance(source, str | Path | Sequence) or isinstance(source, bytes | bytearray):
        raise TypeError(f"a text is a name, a path or a list of documents, not {type(source).__name__}")
    if not isinstance(source, str | Path):
        name, documents = "the list of documents", list(Fields().documents("the list of documents", _numbered(source)))
    elif name == "builtin":
        documents = _builtin(split)
    elif name in NAMES:
        documents = _from_hub(name, split)
    else:
        check_source(source)
        path = Path(source)
        if path.is_dir():
            documents = from_directory(path, split, fields)
        else:
            documents, digest = from_file(path, fields)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{name} holds no text")
    text = Text(documents, name, digest or "")
    return text if digest else Text(documents, name, hashlib.sha256(text.joined().encode()).hexdigest())


def _numbered(documents: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise ValueError(
                f"the source is a list of documents, which are strings; document {number} is a "
                f"{type(document).__name__}. Token ids are samples already: prune_model takes them as a tensor"
            )
        yield f"document {number}", document


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
        raise ValueError(
            f"cannot read {name} from the Hugging Face hub ({first_line(error)}); "
            "pass a local file or 'builtin' instead"
        ) from error
