"""From a record, such as a line of JSON or a row of a table, to its document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from thanos.text.chat import chat_in, chat_text, is_chat

_TEXT = "text"
_CHATS = ("messages", "conversations", "conversation")
_KINDS = {str: "a string", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Fields:
    """Which field of a record is its document.

    Attributes:
        text_field: its name; None takes ``text``, or else a chat in ``messages``, ``conversations`` or
            ``conversation``.
        tokenizer: whose chat template writes chats; None where there are none.
    """

    text_field: str | None = None
    tokenizer: Any = None

    def choose(self, names: Iterable[str]) -> str | None:
        """The field to take of those there are, or None."""
        there = set(names)
        wanted = (_TEXT, *_CHATS) if self.text_field is None else (self.text_field,)
        return next((name for name in wanted if name in there), None)

    def documents(self, source: str, records: Iterable[tuple[str, Any]]) -> Iterator[str]:
        """The document of each record.

        Args:
            source: where the records come from; for errors.
            records: where in it each of them is, and the record: an object, a string or a list of messages.

        Raises:
            ValueError: a record has no document; the error names it and the reason.
        """
        for place, record in records:
            try:
                text = self._document(record)
                check_text(text)
            except ValueError as error:
                raise ValueError(f"{source}, {place}, {error}") from None
            yield text

    def _document(self, record: Any) -> str:
        if isinstance(record, dict):
            return self._of_field(record)
        if self.text_field is not None:
            raise ValueError(f"has no field {self.text_field!r}, for it is {_kind(record)}")
        if isinstance(record, str):
            return record
        if is_chat(record):
            return chat_text(record, self.tokenizer)
        raise ValueError(f"has no field 'text', for it is {_kind(record)}")

    def _of_field(self, record: dict[str, Any]) -> str:
        name = self.choose(record)
        if name is None:
            wanted = f"no field {self.text_field or _TEXT!r}"
            if self.text_field is None:
                wanted += " that holds a string and no chat in 'messages' or 'conversations'"
            raise ValueError(f"has {wanted}; its fields are {', '.join(record) or 'none'}; name one with --text-field")
        value = record[name]
        if isinstance(value, str):
            chat = chat_in(value) if name in _CHATS else None
            return value if chat is None else chat_text(chat, self.tokenizer)
        if is_chat(value):
            return chat_text(value, self.tokenizer)
        if value is None:
            raise ValueError(f"has null in its field {name!r}")
        holds = "a chat" if name in _CHATS else "a string"
        raise ValueError(f"has no field {name!r} that holds {holds}: it holds {_kind(value)}")


def check_text(text: str) -> None:
    """Raise ValueError unless the string can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start + 1}, "
            "which is no text"
        ) from None


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
