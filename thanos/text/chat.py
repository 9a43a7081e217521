"""Chats as text, written by the tokenizer's chat template."""

from __future__ import annotations

import json
from typing import Any

_ROLES = {  # what ShareGPT and its kin call them
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages: ``{"role": ..., "content": ...}`` or ``{"from": ..., "value": ...}``."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and _speaker(one) for one in value)


def chat_text(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """Messages as the tokenizer's chat template writes them, without a prompt for the next one.

    Raises:
        ValueError: the tokenizer has no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "is a chat, and the tokenizer has no chat template to write it with; "
            "name a field that holds text with --text-field"
        )
    plain = [_message(message, number) for number, message in enumerate(messages, 1)]
    said = [text for message in plain if (text := str(message.get("content") or "").strip())]
    in_parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in plain
    ]
    reason = "it writes none of the messages"
    for form in (plain, in_parts):  # templates of multimodal models may take parts alone, and leave strings out
        try:
            text = str(tokenizer.apply_chat_template(form, tokenize=False))
        except Exception as error:  # whatever the template raises, of its own or by a mistake
            reason = reason if form is in_parts else " ".join(str(error).split()) or type(error).__name__
            continue
        if not said or any(one in text for one in said):
            return text
    raise ValueError(f"is a chat that the tokenizer's chat template does not take: {reason}")


def chat_in(text: str) -> list[dict[str, Any]] | None:
    """The chat that a string holds as JSON, as in a table of strings; None where it holds none."""
    try:
        value = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    return value if is_chat(value) else None


def _speaker(message: dict[str, Any]) -> Any:
    return message.get("role") or message.get("from")


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message in the form that templates take; what is null in it, as in a table, is not there."""
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if "role" not in message:
        role = _ROLES.get(str(message["from"]).lower())
        if role is None:
            raise ValueError(f"is a chat whose message {number} is from {message['from']!r}, a role that is not known")
        rest = {name: value for name, value in message.items() if name not in ("from", "value")}
        message = {"role": role, "content": message.get("value"), **rest}
    content = message.get("content")
    if isinstance(content, list):
        message = {**message, "content": "".join(_part(part, number) for part in content)}
    elif not isinstance(content, str) and not message.get("tool_calls"):
        raise ValueError(f"is a chat whose message {number} has no content that is a string")
    return message


def _part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"is a chat whose message {number} holds something that is not text ({kind})")
    return text
