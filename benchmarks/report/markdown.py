"""Markdown: tables, numbers and folded parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev

NOTHING = ""


def table(header: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text and whose others are numbers, aligned right."""
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def folded(summary: str, text: str) -> str:
    return f"<details markdown>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _decimals(value: float) -> int:
    """So many that three significant digits show, and at most two."""
    return 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0


def number(value: float | None) -> str:
    """Two decimals, fewer for large numbers, and three significant digits for small ones."""
    if value is None:
        return NOTHING
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.{_decimals(value)}f}"


def two_decimals(value: float) -> str:
    return f"{value:.2f}"


def percent(share: float | None, decimals: int = 1) -> str:
    return NOTHING if share is None else f"{share:.{decimals}%}"


def spread(values: Sequence[float | None], *, signed: bool = False) -> str:
    """Mean ± standard deviation (of a sample) of several values, the only value, or what prevents both."""
    finite = [value for value in values if value is not None]
    if not finite or len(finite) < len(values):
        return "not finite" if values else NOTHING
    if len(finite) == 1 and finite[0] >= 1e5:
        return f"{finite[0]:.1e}"
    decimals = _decimals(mean(finite))
    text = f"{mean(finite):{'+' if signed else ''}.{decimals}f}".replace("-", "−")
    return text if len(finite) == 1 else f"{text} ± {stdev(finite):.{decimals}f}"


def accuracy(score: dict[str, float | None]) -> str:
    """Percent ± standard error of an ``accuracy`` and its ``stderr``."""
    error = score["stderr"]
    return f"{100 * (score['accuracy'] or 0):.1f}" + (NOTHING if error is None else f" ± {100 * error:.1f}")


def listing(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def put_between(text: str, name: str, content: str) -> str:
    """The text with ``content`` between the markers ``<!-- name -->`` and ``<!-- /name -->``; as it is without them."""
    before, begin, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}{begin}\n{content}\n{end}{after}" if begin and end else text
