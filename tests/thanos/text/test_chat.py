"""Chats become text by the tokenizer's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from thanos.text import beginning, load_samples, load_text, tokenize

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'robot' %}{{ raise_exception('there are no robots') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}],
    [{"role": "system", "content": "jumps"}, {"role": "user", "content": "over"}],
]
EXPECTED = ["<s>[user] the fox\n[assistant] the dog\n", "<s>[system] jumps\n[user] over\n"]
SHARED = {"user": "human", "assistant": "gpt", "system": "system"}


@pytest.fixture
def chatty(bos_tokenizer: Any, tmp_path: Path) -> Any:
    """A tokenizer with a chat template, which writes its own ``<s>``, and a post-processor that puts one in front."""
    bos_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = type(bos_tokenizer).from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize(
    "records",
    [
        [{"messages": chat, "id": 1} for chat in CHATS],
        [{"conversation": chat} for chat in CHATS],
        [{"conversations": [{"from": SHARED[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS],
        [{"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]} for chat in CHATS],
        CHATS,
    ],
    ids=["messages", "conversation", "ShareGPT", "parts", "bare lists"],
)
def test_chats_are_written_by_the_template(chatty: Any, tmp_path: Path, records: list[Any]) -> None:
    path = lines(tmp_path / "chat.jsonl", records)
    assert load_text(path, "train", tokenizer=chatty).documents == EXPECTED


def test_chats_in_tables_and_under_other_names(chatty: Any, tmp_path: Path) -> None:
    mixed = [{"talk": CHATS[0]}, {"talk": [{**message, "name": "x"} for message in CHATS[1]]}]
    saved = datasets.Dataset.from_list(mixed)  # the first chat's names are null
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        assert load_text(tmp_path / name, "train", text_field="talk", tokenizer=chatty).documents == EXPECTED


def test_chats_in_tables_of_strings(chatty: Any, tmp_path: Path) -> None:
    table = pandas.DataFrame({"messages": [*map(json.dumps, CHATS), "[a plain remark]"]})
    table.to_csv(tmp_path / "a.csv")
    assert load_text(tmp_path / "a.csv", "train", tokenizer=chatty).documents == [*EXPECTED, "[a plain remark]"]


PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %} {{ part.text }}{% endfor %}{{ '\n' }}{% endfor %}"
)


def test_a_template_that_takes_parts_alone_gets_them(chatty: Any, tmp_path: Path) -> None:
    """Of strings such templates write nothing, and say nothing."""
    chatty.chat_template = "<s>" + PARTS
    path = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS])
    assert load_text(path, "train", tokenizer=chatty).documents == EXPECTED
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{% endfor %}"
    with pytest.raises(ValueError, match=r"line 1, is a chat that .* does not take: it writes none of the messages"):
        load_text(path, "train", tokenizer=chatty)


def test_text_goes_before_chats(tmp_path: Path) -> None:
    path = lines(tmp_path / "both.jsonl", [{"messages": CHATS[0], "text": "plain"}])
    assert load_text(path, "train").documents == ["plain"]


def test_what_the_template_puts_in_front_is_not_doubled(chatty: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", [{"messages": chat} for chat in CHATS * 5])
    stream = tokenize(load_text(path, "train", tokenizer=chatty), chatty).tolist()
    assert beginning(chatty).tokens == (1,)
    assert stream[0] == 1
    assert 1 not in stream[1:]
    tokens = load_samples(path, chatty, 3, 16).tokens
    assert bool((tokens[:, 0] == 1).all())
    assert not bool((tokens[:, 1:] == 1).any())


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "robot", "content": "beep"}], "does not take: there are no robots"),
        ([{"from": "martian", "value": "hi"}], "message 1 is from 'martian', a role that is not known"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 holds something that is not text (image)"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "message 2 has no content that is a string"),
        ([{"text": "a"}], "has no field 'messages' that holds a chat: it holds a list"),
        ([], "has no field 'messages' that holds a chat: it holds a list"),
        (None, "has null in its field 'messages'"),
    ],
)
def test_chats_that_cannot_be_written_are_named(chatty: Any, tmp_path: Path, messages: Any, says: str) -> None:
    path = lines(tmp_path / "chat.jsonl", [{"messages": CHATS[0]}, {"messages": messages}])
    with pytest.raises(ValueError, match=r"line 2, ") as caught:
        load_text(path, "train", tokenizer=chatty)
    assert says in str(caught.value)


def test_a_tokenizer_without_a_template_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "chat.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(ValueError, match=r"line 1, is a chat, and the tokenizer has no chat template"):
        load_samples(path, tiny_tokenizer, 1, 4)
