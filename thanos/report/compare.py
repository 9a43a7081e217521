"""Several runs side by side, on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from thanos.report import numbers
from thanos.report.depth import compared_plots
from thanos.report.figures import bars
from thanos.report.page import document, fact, what
from thanos.report.read import Run, as_number
from thanos.report.table import layer_table

_Row = tuple[str, Callable[[Run], float | None], Callable[[float | None], str], bool]


def compare_page(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    titles = _titles(runs)
    heading = f"{len(runs)} runs side by side"
    sentences = "".join(
        f"<li><b>{escape(title)}</b>: {what(run)}</li>" for title, run in zip(titles, runs, strict=True)
    )
    total = [run.number("seconds", "total") or 0.0 for run in runs]
    times = bars(
        "Time",
        "Seconds of each run, reading and writing not counted.",
        [(title, value, numbers.seconds(value)) for title, value in zip(titles, total, strict=True)],
    )
    plots = "".join(compared_plots(runs, titles))
    parts = [
        f"<header><p class='kind'>Pruning report</p><h1>{heading}</h1></header>",
        f"<section><h2>What was done</h2><ul class='hints'>{sentences}</ul></section>",
        f"<section><h2>Numbers</h2><div class='compared'>{_numbers(runs, titles)}</div></section>",
        f"<section><h2>Over depth</h2><div class='plots'>{plots}{times}</div></section>",
    ]
    if table := layer_table(runs, titles):
        parts.append(f"<section><h2>Layers</h2>{table}</section>")
    if differences := _differences(runs, titles):
        parts.append(f"<section><h2>Options that differ</h2><div class='compared'>{differences}</div></section>")
    return document(heading, parts)


def _titles(runs: Sequence[Run]) -> list[str]:
    """A name for each run, no two alike."""
    several = Counter(run.title for run in runs)
    seen: Counter[str] = Counter()
    titles = []
    for run in runs:
        seen[run.title] += 1
        titles.append(f"{run.title} ({seen[run.title]})" if several[run.title] > 1 else run.title)
    return titles


def _median_loss(run: Run) -> float | None:
    return as_number(run.worst[(len(run.worst) - 1) // 2]["relative_loss"]) if run.worst else None


_ROWS: Sequence[_Row] = (
    ("perplexity, dense", lambda run: run.number("perplexity", "dense"), numbers.perplexity, False),
    ("perplexity, pruned", lambda run: run.number("perplexity", "pruned"), numbers.perplexity, True),
    ("effective sparsity", lambda run: run.number("effective_sparsity"), numbers.share, False),
    ("nominal sparsity", lambda run: run.number("nominal_sparsity"), numbers.share, False),
    ("median relative loss", _median_loss, numbers.small, True),
    (
        "largest relative loss",
        lambda run: as_number(run.worst[0]["relative_loss"]) if run.worst else None,
        numbers.small,
        True,
    ),
    ("parameters", lambda run: run.number("size", "parameters", "after"), numbers.count, False),
    ("weights on disk", lambda run: run.number("size", "bytes", "after"), numbers.size, True),
    ("layers pruned", lambda run: float(len(run.layers)), numbers.count, False),
    ("layers with more damping", lambda run: float(len(run.raised)), numbers.count, False),
    ("time", lambda run: run.number("seconds", "total"), numbers.seconds, True),
)


def _numbers(runs: Sequence[Run], titles: Sequence[str]) -> str:
    """A row a number, a column a run; the best is marked where lower is better and the runs differ."""
    rows = []
    for name, value, said, lower in _ROWS:
        values = [value(run) for run in runs]
        known = [one for one in values if one is not None]
        if known:
            best = min(known) if lower and len(set(known)) > 1 else None
            rows.append((name, [(said(one), one is not None and one == best) for one in values]))
    text = [
        (name, [(run.text(name) or numbers.NOTHING, False) for run in runs])
        for name in ("method", "pattern")
        if any(run.text(name) for run in runs)
    ]
    return _table(titles, [*text, *rows])


def _differences(runs: Sequence[Run], titles: Sequence[str]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows = []
    for name in names:
        values = [fact(run.options[name]) if name in run.options else numbers.NOTHING for run in runs]
        if len(set(values)) > 1:
            rows.append((name, [(value, False) for value in values]))
    return _table(titles, rows, ready=True) if rows else ""


def _table(titles: Sequence[str], rows: Sequence[tuple[str, list[tuple[str, bool]]]], ready: bool = False) -> str:
    head = "".join(f"<th scope='col'>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        + "".join(
            f"<td{' class=best' if best else ''}>{value if ready else escape(value)}</td>" for value, best in values
        )
        + "</tr>"
        for name, values in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
