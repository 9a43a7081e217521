"""Local copies of the zero-shot tasks: which file is taken, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from zero_shot_files import documents, write_task

from thanos.scoring.task_files import find_file, read_file


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("arc_easy", "arc_easy.jsonl"),
        ("arc_easy", "ARC-Easy.jsonl"),
        ("arc_challenge", "ARC-Challenge-test.jsonl"),
        ("winogrande", "winogrande_xl_validation.jsonl"),
        ("boolq", "BoolQ.val.jsonl"),
        ("piqa", "PIQA_dev.JSONL"),
    ],
)
def test_names_that_are_found(tmp_path: Path, task: str, name: str) -> None:
    assert find_file(task, write_task(tmp_path, task, name=name).parent) == tmp_path / name


def test_names_that_are_not(tmp_path: Path) -> None:
    for name in ("arc_easy_train.jsonl", "arc.jsonl", "my_piqa.jsonl", "boolq.json", "piqa.jsonl.gz"):
        write_task(tmp_path, "piqa", name=name)
    assert [find_file(task, tmp_path) for task in ("arc_easy", "piqa", "boolq")] == [None] * 3


def test_of_several_files_the_plain_name_is_taken(tmp_path: Path) -> None:
    for name in ("arc_easy_test.jsonl", "arc_easy_validation.jsonl"):
        write_task(tmp_path, "arc_easy", name=name)
    with pytest.raises(ValueError, match=r"several files for the task arc_easy .*name one of them arc_easy.jsonl"):
        find_file("arc_easy", tmp_path)
    plain = write_task(tmp_path, "arc_easy")
    assert find_file("arc_easy", tmp_path) == plain


def test_documents_are_read_in_order_with_the_columns_that_matter(tmp_path: Path) -> None:
    path = write_task(tmp_path, "boolq")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    file = read_file("boolq", path)
    expected = [{key: row[key] for key in ("passage", "question", "label")} for row in documents("boolq", 8)]
    assert file.documents == expected
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def one(task: str, **changes: Any) -> str:
    record = {**documents(task, 1)[0], **changes}
    return json.dumps({key: value for key, value in record.items() if value is not None})


@pytest.mark.parametrize(
    ("task", "line", "says"),
    [
        ("piqa", "{oops", "line 2, is not JSON"),
        ("piqa", "[1]", "line 2, is not a JSON object"),
        ("piqa", one("piqa", sol2=None), "line 2, lacks the column 'sol2' of the task piqa"),
        ("piqa", one("piqa", label=2), "its label is neither 0 nor 1"),
        ("piqa", one("piqa", label=True), "its label is neither 0 nor 1"),
        ("piqa", one("piqa", goal=3), "its goal is not a string"),
        ("winogrande", one("winogrande", sentence="no gap"), "its sentence has no gap '_'"),
        ("winogrande", one("winogrande", answer="3"), "its answer is neither '1' nor '2'"),
        ("arc_easy", one("arc_easy", choices=["a"]), "its choices are not an object"),
        ("arc_easy", one("arc_easy", choices={"text": ["a"], "label": ["A", "B"]}), "not as many texts as labels"),
        ("openbookqa", one("openbookqa", answerKey="E"), "its answerKey is not among the labels"),
        ("hellaswag", one("hellaswag", endings="abc"), "its endings are not a list of strings"),
        ("hellaswag", one("hellaswag", label="4"), "its label is not that of an ending"),
        ("hellaswag", one("hellaswag", label=""), "its label is not that of an ending"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, task: str, line: str, says: str) -> None:
    path = write_task(tmp_path, task, 1)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=says) as raised:
        read_file(task, path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_without_documents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="holds no documents"):
        read_file("piqa", path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read"):
        read_file("piqa", path)
