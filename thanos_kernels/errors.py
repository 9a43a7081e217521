"""Errors of other libraries in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop; the error's type where it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")
