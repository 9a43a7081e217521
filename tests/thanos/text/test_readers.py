"""Text in the forms that people have it in: kinds of file, compression, directories, saved data sets, and fields."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from thanos.text import check_source, load_samples, load_text

DOCUMENTS = ["one two", 'three,\n"four"', "NA", "fünf"]
RECORDS = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def parquet(folder: Path) -> bytes:
    pandas.DataFrame(RECORDS).to_parquet(folder / "made.parquet")
    content = (folder / "made.parquet").read_bytes()
    (folder / "made.parquet").unlink()
    return content


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, split: str = "train", **options: Any) -> list[str]:
    return load_text(path, split, **options).documents


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.jsonl", LINES),
        ("text.ndjson", LINES),
        ("text.json", LINES),
        ("text.json", json.dumps(RECORDS, indent=2)),
        ("text.json", json.dumps({"version": "1", "data": RECORDS})),
        ("text.json", json.dumps(DOCUMENTS)),
        ("text.csv", pandas.DataFrame(RECORDS).to_csv(index=False)),
        ("text.csv", "\ufeff" + pandas.DataFrame(RECORDS).to_csv(index=False)),
        ("text.tsv", pandas.DataFrame(RECORDS).to_csv(index=False, sep="\t")),
    ],
)
@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".XZ", lzma.compress)],
)
def test_every_kind_of_file_compressed_or_not(
    tmp_path: Path, name: str, content: str, ending: str, compress: Any
) -> None:
    path = put(tmp_path / f"{name}{ending}", compress(content.encode()))
    check_source(path)
    text = load_text(path, "train")
    assert text.documents == DOCUMENTS
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_plain_text_and_parquet_compressed(tmp_path: Path) -> None:
    assert read(put(tmp_path / "text.txt.zst", zstd(b"a\r\nb") + zstd(b"c"))) == ["a\nbc"]
    assert read(put(tmp_path / "text.parquet.gz", gzip.compress(parquet(tmp_path)))) == DOCUMENTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_that_says_how_it_is_encoded(tmp_path: Path, encoding: str) -> None:
    for name, content in (
        ("a.txt", "Ströme"),
        ("a.json", '["Ströme"]'),
        ("a.jsonl", '{"text": "Ströme"}'),
        ("a.csv", 'text,id\r\n"Ströme",1\r\n'),
        ("a.tsv", "text\tid\nStröme\t1\n"),
    ):
        assert read(put(tmp_path / name, content.encode(encoding))) == ["Ströme"]


def test_what_is_no_text_is_said_to_be_none(tmp_path: Path, tiny_tokenizer: Any) -> None:
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "empty"))
    for source, kind, says in (
        (tmp_path / "empty", ValueError, "empty holds no text"),
        ("", ValueError, "its name is not empty"),
        (b"the fox", TypeError, "a text is a name, a path or a list of documents, not bytes"),
        (bytearray(b"the fox"), TypeError, "not bytearray"),
    ):
        with pytest.raises(kind, match=says):
            load_samples(source, tiny_tokenizer, 1, 2)


def test_one_json_object_is_one_record(tmp_path: Path) -> None:
    assert read(put(tmp_path / "text.json", '{"text": "a", "tags": ["b"]}')) == ["a"]


def test_another_field_is_taken_by_name(tmp_path: Path) -> None:
    records = [{"text": "title", "body": "one"}, {"text": "title", "body": "two"}]
    frame = pandas.DataFrame(records)
    put(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    put(tmp_path / "a.json", json.dumps(records))
    put(tmp_path / "a.csv", frame.to_csv())
    frame.to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "saved"):
        assert read(tmp_path / name, text_field="body") == ["one", "two"]
        with pytest.raises(ValueError, match=r"'content'.*its (fields|columns) are .*text, body.*--text-field"):
            read(tmp_path / name, text_field="content")


def test_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_list([{"text": text}]) for text in ("a", "b"))
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, validation=test).save_to_disk(str(tmp_path / "two"))
    check_source(tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "one", "test") == ["a"]
    assert (read(tmp_path / "two"), read(tmp_path / "two", "test")) == (["a"], ["b"])
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="cannot read the data set saved in"):
        read(tmp_path / "one")


def test_directories_of_files_and_their_splits(tmp_path: Path) -> None:
    put(tmp_path / "shards" / "b.jsonl.zst", zstd(b'{"text": "b"}'))
    put(tmp_path / "shards" / "a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0))
    put(tmp_path / "books" / "README.md", "no book")
    put(tmp_path / "books" / "old" / "b.txt", "second\n\nbook")
    put(tmp_path / "books" / "a.txt", "first book")
    put(tmp_path / "splits" / "data" / "train-00000-of-00001.jsonl", '{"text": "train"}')
    put(tmp_path / "splits" / "data" / "test-00000-of-00001.jsonl", '{"text": "test"}')
    assert read(tmp_path / "shards") == ["a", "b"]
    assert sorted(read(tmp_path / "books")) == ["first book", "second\n\nbook"]
    assert (read(tmp_path / "splits"), read(tmp_path / "splits", "test")) == (["train"], ["test"])
    assert load_text(tmp_path / "shards", "train").sha256 == hashlib.sha256(b"a\n\nb").hexdigest()
    put(tmp_path / "other" / "a.bin", "x")
    with pytest.raises(ValueError, match=r"the directory .*other holds no text that is read"):
        read(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2, has null in its field 'text'"),
        ("a.json", '[{"text": "a"}, null]', "row 2, has no field 'text', for it is null"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b \\ud800"}', r"line 2, holds half of a surrogate pair (\ud800) at char"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "cannot read PATH, line 2: 'utf-8' codec can't decode"),
        ("a.jsonl", '{"text": ["a"]}', "line 1, has no field 'text' that holds a string: it holds a list"),
        ("a.jsonl", '{"messages": 5}', "line 1, has no field 'messages' that holds a chat: it holds a number"),
        ("a.jsonl", '{"body": "a", "id": 1}', "its fields are body, id; name one with --text-field"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', "is not JSON: Expecting ',' delimiter: line 2"),
        ("a.json", '{"text": "a"}\n{"text": 5}', "line 2, has no field 'text' that holds a string: it holds a number"),
        ("a.csv", "id,text\n1,a,b\n2,c,d\n", "is not a table with ',' between its columns"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"text\n\xff\n", "cannot read"),
        ("a.csv", "", "holds no text"),
        ("a.jsonl.gz", "{}", "it is damaged or no .gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "it is damaged or no .gz file"),
        ("a.jsonl.zst", "{}", "it is damaged or no .zst file"),
        ("a.jsonl.xz", "{}", "it is damaged or no .xz file"),
        ("a.txt.bz2", "a", "it is damaged or no .bz2 file"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2, is not JSON: maximum recursion depth"),
        ("a.json", "[" * 100_000, "is not JSON: maximum recursion depth"),
        (
            "a.txt",
            b"caf\xe9 au lait",
            "can't decode byte 0xe9 in position 3: invalid continuation byte; save it as UTF-8",
        ),
        ("a.zst", "a", "not one of the kinds of text file that are read: .txt, .jsonl"),
    ],
)
def test_errors_name_the_row_and_the_reason(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path)
    assert says.replace("PATH", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)


def test_null_rows_of_tables_are_named(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        with pytest.raises(ValueError, match=f"{name}, row 2, has null in its field 'text'"):
            read(tmp_path / name)


def test_a_list_of_documents_is_a_text(tiny_tokenizer: Any, tmp_path: Path) -> None:
    documents = ["the quick brown fox " * 9, "jumps over the lazy dog " * 9]
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in documents))
    listed = load_samples(documents, tiny_tokenizer, 5, 12)
    assert listed.tokens.tolist() == load_samples(path, tiny_tokenizer, 5, 12).tokens.tolist()
    for wrong, says in (
        ([[1, 2, 3], [4, 5, 6]], "document 1 is a list. Token ids are samples already"),
        (["a", None], "document 2 is a NoneType"),
        (["a", "\ud800"], "document 2, holds half of a surrogate pair"),
        ([], "holds no text"),
    ):
        with pytest.raises(ValueError, match=says):
            load_samples(wrong, tiny_tokenizer, 1, 2)
