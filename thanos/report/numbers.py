"""Numbers as a person reads them."""

from __future__ import annotations

from typing import Any

from thanos.report.read import as_number

_DECIMAL = (("", 1), ("k", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12))
NOTHING = "–"


def share(value: Any) -> str:
    """``0.5`` is ``50.00%``."""
    number = as_number(value)
    return NOTHING if number is None else f"{number:.2%}"


def small(value: Any) -> str:
    """Three digits, such as a loss has: ``0.0123``, ``1.23e-05``."""
    number = as_number(value)
    return NOTHING if number is None else f"{number:.3g}"


def perplexity(value: Any) -> str:
    """``22.55``; ``1.5e+08`` where it is far off."""
    number = as_number(value)
    if number is None:
        return NOTHING
    return f"{number:.2f}" if number < 10_000 else f"{number:.2e}"


def size(value: Any) -> str:
    """Bytes: ``269 MB``."""
    number = as_number(value)
    return NOTHING if number is None else f"{_scaled(number)}B"


def count(value: Any) -> str:
    """``135 M``, ``30.5 B``; small numbers as they are."""
    number = as_number(value)
    if number is None:
        return NOTHING
    return f"{number:,.0f}" if number < 100_000 else _scaled(number).strip().replace("G", "B")


def seconds(value: Any) -> str:
    """``0.42 s``, ``26 s``, ``3:05 min``, ``1:02:03 h``."""
    number = as_number(value)
    if number is None:
        return NOTHING
    if number < 60:
        return f"{number:.2g} s" if number < 10 else f"{number:.0f} s"
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def change(before: Any, after: Any) -> str:
    """``x 1.98``: how many times as much; empty where that says nothing."""
    old, new = as_number(before), as_number(after)
    if old is None or new is None or old <= 0 or new < 0:
        return ""
    ratio = new / old
    return f"× {ratio:.2f}" if ratio < 100 else f"× {ratio:.2g}"


def _scaled(number: float) -> str:
    for prefix, unit in reversed(_DECIMAL):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {prefix}" if unit == 1 or value >= 100 else f"{value:.3g} {prefix}"
    return f"{number:.0f} "
