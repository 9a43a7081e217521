"""Calibration samples: drawn by the seed alone, from the text alone, and clear refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos.text import load_samples, load_text, tokenize


class Words:
    """A tokenizer for words that are numbers: each is its own token."""

    def __call__(self, text: str | list[str]) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [int(word) for word in text.split()]}
        return {"input_ids": [self(one)["input_ids"] for one in text]}


def numbers(first: int, count: int) -> str:
    return " ".join(str(first + index) for index in range(count))


def write(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 8), length=st.integers(1, 12), seed=st.integers(0, 2**63 - 1))
def test_short_documents_give_windows_that_do_not_overlap(
    tmp_path_factory: pytest.TempPathFactory, samples: int, length: int, seed: int
) -> None:
    path = write(tmp_path_factory.mktemp("short"), [numbers(1, 50), numbers(51, 50)])
    if samples == 2 and length < 50:
        return  # enough long documents
    tokens = load_samples(path, Words(), samples, length, seed).tokens
    assert tokens.shape == (samples, length)
    assert tokens.dtype == torch.int64
    if samples > 2:
        assert len(tokens.unique()) == tokens.numel()  # every token of the text is another one
    assert bool((tokens.diff(dim=1) == 1).all())


def test_long_documents_give_one_window_each(tmp_path: Path) -> None:
    documents = [numbers(1000 * index, 30 + index) for index in range(1, 9)]
    tokens = load_samples(write(tmp_path, documents), Words(), 8, 20, seed=3).tokens
    assert sorted((tokens[:, 0] // 1000).tolist()) == list(range(1, 9))
    assert bool((tokens.diff(dim=1) == 1).all())
    assert len({int(first) % 1000 for first in tokens[:, 0]}) > 1  # not all from the beginning


def test_seed_alone_decides(tmp_path: Path) -> None:
    path = write(tmp_path, [numbers(1, 4000)])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = load_samples(path, Words(), 5, 16, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one.tokens, load_samples(path, Words(), 5, 16, seed=7).tokens)
    assert not torch.equal(one.tokens, load_samples(path, Words(), 5, 16, seed=8).tokens)


def test_all_kinds_of_file_hold_the_same_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = ["one two", "three\nfour", "fünf"]
    parquet.write_table(pyarrow.table({"text": documents, "id": [1, 2, 3]}), tmp_path / "text.parquet")
    plain = tmp_path / "text.txt"
    plain.write_text("\n\n".join(documents), encoding="utf-8")
    texts = [load_text(path, "train") for path in (write(tmp_path, documents), tmp_path / "text.parquet", plain)]
    assert len({text.joined() for text in texts}) == 1
    assert texts[2].sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()


def test_builtin_needs_no_network_and_keeps_a_test_split() -> None:
    train, test = load_text("builtin", "train"), load_text("builtin", "test")
    assert len(train.joined()) > 100_000
    assert not set(train.documents) & set(test.documents)
    assert train.sha256 == hashlib.sha256(train.joined().encode()).hexdigest()


def test_windows_line_ends_read_as_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"1 2\r\n3\r\n")
    assert load_text(path, "train").joined() == "1 2\n3\n"
    assert tokenize(load_text(path, "train"), Words()).tolist() == [1, 2, 3]


def test_too_little_text_says_how_much(tmp_path: Path) -> None:
    path = write(tmp_path, [numbers(1, 99)])
    with pytest.raises(ValueError, match=r"holds 99 tokens, but 10 samples of 10 need 100"):
        load_samples(path, Words(), 10, 10)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("text.txt", b"", "holds no text"),
        ("text.txt", b" \n\n", "holds no text"),
        ("text.jsonl", b"", "holds no text"),
        ("text.txt", b"\xff\xfe\x00", "cannot read"),
        ("text.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2, has no field 'text'"),
        ("text.jsonl", b'{"text": 5}\n', "line 1, has no field 'text' that holds a string"),
        ("text.jsonl", b'{"text": "a"}\n\n{oops\n', "line 3, is not JSON"),
        ("text.parquet", b"no parquet", "not a Parquet file"),
        ("text.csv", b"a,b", "no column 'text' of strings; its columns are a, b"),
        ("text.pdf", b"a,b", "not one of the kinds"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        load_samples(path, Words(), 1, 1)
    assert str(path) in str(caught.value)


def test_parquet_without_text_names_its_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no column 'text' of strings; its columns are body, id"):
        load_text(tmp_path / "text.parquet", "train")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match=r"neither one of c4, wikitext2, builtin nor a file"):
            load_samples(path, Words(), 1, 1)


@pytest.mark.usefixtures("other_default")
@pytest.mark.parametrize("count", [1, 8])
def test_samples_do_not_depend_on_defaults(bos_tokenizer: Any, tmp_path: Path, count: int) -> None:
    path = write(tmp_path, ["the quick brown fox " * (60 // count)] * count)  # joined, and one window a document
    tokens = load_samples(path, bos_tokenizer, 4, 8).tokens
    assert (tokens.device.type, tokens.dtype) == ("cpu", torch.int64)
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        assert torch.equal(tokens, load_samples(path, bos_tokenizer, 4, 8).tokens)
