"""Files of text: their kinds, compressed or not, and the records in them.

JSON is read here and not by ``datasets``, whose reader does not say which line it cannot read; so are tables, in which
it takes the text "NA" for a missing one.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thanos.text.fields import Fields
from thanos.text.json_lines import json_lines
from thanos_kernels.errors import first_line

_MARKS = {  # the longer ones first, for one begins as another
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_TEXT = ".txt"  # the whole of it is one document

Records = Iterator[tuple[str, Any]]  # where in the file, and what


def kinds() -> str:
    """The kinds of file that are read, for errors."""
    return f"{', '.join((_TEXT, *_READERS))}, each also with {', '.join(_DECOMPRESSORS)}"


def is_readable(path: Path) -> bool:
    """Whether the name is that of a kind of file that is read."""
    return _endings(path)[0] in (_TEXT, *_READERS)


def read_documents(path: Path, content: bytes, fields: Fields) -> Iterator[str]:
    """The documents of a file.

    Args:
        path: its name decides what it is.
        content: its bytes.

    Raises:
        ValueError: it is not what its name says, or a record in it has no document.
    """
    kind, compression = _endings(path)
    try:
        plain = _DECOMPRESSORS[compression](content) if compression else content
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {path}: it is damaged or no {compression} file ({error})") from error
    try:
        if kind != ".parquet":
            plain = _as_utf8(plain)
        if kind == _TEXT:
            yield plain.decode("utf-8-sig").replace("\r\n", "\n")
        else:
            yield from fields.documents(str(path), _READERS[kind](path, plain, fields))
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}; save it as UTF-8") from error


def _as_utf8(content: bytes) -> bytes:
    """Text whose first bytes say that it is UTF-16 or UTF-32, as some programs of Windows write it, in UTF-8."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding).encode()
    return content


def _endings(path: Path) -> tuple[str, str]:
    """The kind of a file and how it is compressed, such as ``.jsonl`` and ``.gz``."""
    compression = path.suffix.lower()
    if compression not in _DECOMPRESSORS:
        return compression, ""
    return Path(path.stem).suffix.lower(), compression


def _unzstd(content: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
        return bytes(stream.read())


def _lines(path: Path, content: bytes, fields: Fields) -> Records:
    return ((f"line {number}", value) for number, value in json_lines(path, content))


def _json(path: Path, content: bytes, fields: Fields) -> Records:
    """One list of records, an object that holds one, a single record; or a record a line."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _lines(path, content, fields)
            return
        if isinstance(error, UnicodeDecodeError):
            raise
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(value, dict) and fields.choose(value) is None:
        lists = [entry for entry in value.values() if isinstance(entry, list) and entry]
        value = lists[0] if len(lists) == 1 else value
    rows = value if isinstance(value, list) else [value]
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _table(separator: str) -> Callable[[Path, bytes, Fields], Records]:
    def read(path: Path, content: bytes, fields: Fields) -> Records:
        import pandas

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows longer than the header
                table = pandas.read_csv(
                    io.BytesIO(content),
                    sep=separator,
                    dtype=str,
                    keep_default_na=False,
                    index_col=False,
                    encoding="utf-8-sig",
                )
        except pandas.errors.EmptyDataError:
            return
        except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
            raise ValueError(f"{path} is not a table with {separator!r} between its columns: {error}") from None
        name = column(str(path), list(table.columns), fields)
        yield from rows(name, table[name])

    return read


def _parquet(path: Path, content: bytes, fields: Fields) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        name = column(str(path), file.schema_arrow.names, fields)
        values = file.read(columns=[name]).column(name).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file: {first_line(error)}") from None
    yield from rows(name, values)


def column(source: str, names: list[str], fields: Fields) -> str:
    """The column of a table that holds its documents.

    Raises:
        ValueError: there is none.
    """
    name = fields.choose(names)
    if name is None:
        raise ValueError(
            f"{source} has no column {fields.text_field or 'text'!r} of strings; its columns are "
            f"{', '.join(map(str, names)) or 'none'}; name one with --text-field"
        )
    return name


def rows(name: str, values: Any) -> Records:
    """Records of one column, and their numbers from 1."""
    return ((f"row {number}", {name: value}) for number, value in enumerate(values, 1))


_READERS: dict[str, Callable[[Path, bytes, Fields], Records]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".zst": _unzstd,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
