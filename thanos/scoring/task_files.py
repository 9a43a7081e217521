"""Local copies of the zero-shot tasks: JSONL files in the columns of the datasets that lm-eval reads from the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thanos.text.json_lines import json_lines

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """The documents of one task, reduced to the columns it needs, and the file that they were read from."""

    path: Path
    sha256: str
    documents: list[Record]


def find_file(task: str, folder: Path) -> Path | None:
    """The task's file in ``folder``, or None.

    Case does not matter, hyphens and underscores are the same, and the name may end in the split that lm-eval scores,
    ``validation`` (``val``, ``dev``) or ``test``: ``arc_easy.jsonl``, ``ARC-Easy.jsonl``, ``arc_easy_test.jsonl``.
    ``arc_easy.jsonl`` itself goes before the others.

    Args:
        task: lm-eval's name of the task.
        folder: where to look; subdirectories are not searched.

    Raises:
        ValueError: several files could be meant.
    """
    if (exact := folder / f"{task}.jsonl").is_file():
        return exact
    names = "|".join((task, *_OTHER_NAMES.get(task, ())))
    pattern = re.compile(rf"(?:{names})(?:_(?:validation|valid|val|dev|test))?_jsonl")
    found = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(re.sub(r"[-. ]", "_", path.name.lower()))]
    if len(found) > 1:
        named = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} holds several files for the task {task} ({named}); name one of them {task}.jsonl")
    return found[0] if found else None


def read_file(task: str, path: Path) -> TaskFile:
    """Read and check the documents of ``task``.

    Raises:
        ValueError: the file cannot be read, holds no document, or a line is no document of this task.
    """
    columns, check = _CHECKS[task]
    try:
        content = path.read_bytes()
        lines = list(json_lines(path, content))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    documents = []
    for number, record in lines:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object")
        if missing := [column for column in columns if column not in record]:
            raise ValueError(f"{path}, line {number}, lacks the column {missing[0]!r} of the task {task}")
        if problem := check(record):
            raise ValueError(f"{path}, line {number}, is no document of the task {task}: {problem}")
        documents.append({column: record[column] for column in columns})
    if not documents:
        raise ValueError(f"{path} holds no documents")
    return TaskFile(path, hashlib.sha256(content).hexdigest(), documents)


def _winogrande(record: Record) -> str | None:
    if "_" not in record["sentence"]:
        return "its sentence has no gap '_'"
    return None if record["answer"] in ("1", "2") else "its answer is neither '1' nor '2'"


def _lettered(record: Record) -> str | None:
    choices = record["choices"]
    if not isinstance(choices, dict) or not all(_is_texts(choices.get(part)) for part in ("text", "label")):
        return "its choices are not an object of the lists 'text' and 'label'"
    if len(choices["text"]) != len(choices["label"]) or not choices["text"]:
        return "its choices have not as many texts as labels"
    return None if record["answerKey"] in choices["label"] else "its answerKey is not among the labels of its choices"


def _endings(record: Record) -> str | None:
    if not _is_texts(record["endings"]) or not record["endings"]:
        return "its endings are not a list of strings"
    label = str(record["label"])
    return None if label.isdecimal() and int(label) < len(record["endings"]) else "its label is not that of an ending"


def _two_choices(record: Record) -> str | None:
    return None if type(record["label"]) is int and record["label"] in (0, 1) else "its label is neither 0 nor 1"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _with_texts(
    texts: tuple[str, ...], others: tuple[str, ...], check: Callable[[Record], str | None]
) -> tuple[tuple[str, ...], Callable[[Record], str | None]]:
    """The columns of a task, and a check that ``texts`` are strings and ``check`` holds."""

    def checked(record: Record) -> str | None:
        wrong = [column for column in texts if not isinstance(record[column], str)]
        return f"its {wrong[0]} is not a string" if wrong else check(record)

    return texts + others, checked


_OTHER_NAMES = {"winogrande": ("winogrande_xl",), "openbookqa": ("openbookqa_main",)}
_ARC = _with_texts(("question", "answerKey"), ("choices",), _lettered)
_CHECKS = {
    "winogrande": _with_texts(("sentence", "option1", "option2", "answer"), (), _winogrande),
    "openbookqa": _with_texts(("question_stem", "answerKey"), ("choices",), _lettered),
    "boolq": _with_texts(("passage", "question"), ("label",), _two_choices),
    "piqa": _with_texts(("goal", "sol1", "sol2"), ("label",), _two_choices),
    "hellaswag": _with_texts(("activity_label", "ctx_a", "ctx_b"), ("endings", "label"), _endings),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
}
