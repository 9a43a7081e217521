"""Calibration samples: text from the hub, a file or Python's own documentation, drawn into token windows by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.text.json_lines import json_lines

NAMES = ("c4", "wikitext2", "builtin")
_C4_DOCUMENTS = {"train": 20_000, "validation": 1_100}  # the first ones of the split's first file
_BATCH = 256  # documents tokenised at a time


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


@dataclass(frozen=True)
class Samples:
    """Calibration samples.

    Attributes:
        tokens: (N, S), int64.
        source, sha256: of the text they were drawn from, see :class:`Text`.
        seed: they were drawn with.
    """

    tokens: Tensor
    source: str
    sha256: str
    seed: int

    def provenance(self) -> dict[str, Any]:
        """What a report says of them."""
        count, length = self.tokens.shape
        return {
            "source": self.source,
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": count,
            "sequence_length": length,
        }


def load_samples(source: str | Path, tokenizer: Any, samples: int = 128, length: int = 2048, seed: int = 0) -> Samples:
    """Draw calibration samples.

    Where enough documents are longer than ``length`` tokens, each sample is a random window of another one, as the
    C4 loader of SparseGPT takes them. Otherwise the documents are joined by blank lines and cut, from a random start,
    into windows that do not overlap, of which a random choice is taken.

    Args:
        source: ``c4``, ``wikitext2``, ``builtin``, or a .txt, .jsonl or .parquet file (field ``text``).
        tokenizer: a Hugging Face tokenizer.
        samples, length: N and S, the number of samples and the tokens in each.
        seed: of a generator of its own; global random state is neither used nor changed.

    Raises:
        ValueError: the source cannot be read, or does not hold ``samples`` x ``length`` tokens.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and sequence length must be at least 1, not {samples} and {length}")
    text = load_text(source, "train")
    generator = torch.Generator().manual_seed(seed)
    tokens = _from_long_documents(text, tokenizer, samples, length, generator)
    if tokens is None:
        tokens = _from_joined_text(text, tokenizer, samples, length, generator)
    return Samples(tokens, text.source, text.sha256, seed)


def _from_long_documents(
    text: Text, tokenizer: Any, samples: int, length: int, generator: torch.Generator
) -> Tensor | None:
    if len(text.documents) < samples:
        return None
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    windows: list[Tensor] = []
    for start in range(0, len(order), _BATCH):
        batch = [text.documents[index] for index in order[start : start + _BATCH]]
        for ids in tokenizer(batch)["input_ids"]:
            if len(ids) > length:
                first = _random_below(len(ids) - length + 1, generator)
                windows.append(torch.tensor(ids[first : first + length], dtype=torch.int64))
            if len(windows) == samples:
                return torch.stack(windows)
    return None


def _from_joined_text(text: Text, tokenizer: Any, samples: int, length: int, generator: torch.Generator) -> Tensor:
    stream = tokenize(text, tokenizer)
    if len(stream) < samples * length:
        raise ValueError(
            f"{text.source} holds {len(stream)} tokens, but {samples} samples of {length} need {samples * length}; "
            "take fewer or shorter samples, or more text"
        )
    windows = len(stream) // length
    first = _random_below(len(stream) - windows * length + 1, generator)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return stream[first : first + windows * length].view(windows, length)[chosen].clone()


def _random_below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator))


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids (T,), int64, of the documents joined by blank lines."""
    return torch.tensor(tokenizer(text.joined())["input_ids"], dtype=torch.int64)


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


def load_text(source: str | Path, split: str) -> Text:
    """Read a text.

    Args:
        source: as for :func:`load_samples`.
        split: ``train``, or ``test`` for what calibration does not see; a file is the same for both.

    Raises:
        ValueError: the source cannot be read or is empty.
    """
    check_source(source)
    name, digest = str(source), None
    if name == "builtin":
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
