"""Plots as HTML with an inline SVG; ``page.js`` adds the values under a pointer.

A plot is a grid: labels are text around a drawing whose lines do not grow with it, so that they are as legible on a
phone as on paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from thanos.report import numbers

COLOURS = 8
MOST_POINTS = 400  # along the x axis; more are drawn as their groups' medians


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: in the legend.
        values: one for each place on the x axis; None where there is none.
        low, high: the edges of a band around it, or empty.
    """

    name: str
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Plot:
    """Lines over one x axis.

    Attributes:
        title: what is shown.
        note: one sentence on how to read it.
        places: the names of the places on the x axis.
        axis: the name of the x axis.
        lines: what is drawn.
        form: how values are written: ``share``, ``small`` or ``count``.
        log: whether the y axis is logarithmic where that is of use.
        span: values that the y axis must show.
    """

    title: str
    note: str
    places: Sequence[str]
    axis: str
    lines: Sequence[Line]
    form: str = "small"
    log: bool = False
    span: Sequence[float] = ()


def median(values: Sequence[float | None]) -> float | None:
    """The middle one of those that are there."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def html(plot: Plot) -> str:
    """The plot; empty where it has no value."""
    plot = _thinned(plot)
    values = [value for line in plot.lines for part in (line.values, line.low, line.high) for value in part]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    positive = [value for value in known if value > 0]
    log = plot.log and bool(positive) and max(positive) > 20 * min(positive)
    scale = _log_scale(positive) if log else _linear_scale([*known, *plot.span])
    drawn = [
        f'<line class="grid" x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in (_y(scale, tick) for tick in scale.ticks)
    ]
    for index, line in enumerate(plot.lines):
        drawn += _drawn(line, index, scale, len(plot.places))
    labels = "".join(
        f'<span style="top:{_y(scale, tick) / 4:.2f}%">{_tick(tick, plot.form)}</span>' for tick in scale.ticks
    )
    legend = "".join(
        f'<span class="{_style(index)}"><svg viewBox="0 0 20 8" aria-hidden="true"><path class="line" d="M0 4h20"/>'
        f"</svg>{escape(line.name)}</span>"
        for index, line in enumerate(plot.lines)
    )
    data = {
        "places": list(plot.places),
        "axis": plot.axis,
        "form": plot.form,
        "lines": [
            {"name": line.name, "values": _rounded(line.values), "low": _rounded(line.low), "high": _rounded(line.high)}
            for line in plot.lines
        ],
    }
    about = f"{plot.title}, over {plot.axis} {plot.places[0]} to {plot.places[-1]}"
    return (
        f'<figure class="plot"><figcaption><h3>{escape(plot.title)}</h3><p>{escape(plot.note)}</p></figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<div class="area" data-plot="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<div class="y">{labels}</div>'
        f'<div class="drawing"><svg viewBox="0 0 1000 400" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(about)}">{"".join(drawn)}</svg></div>'
        f'<div class="x">{_x_labels(plot.places)}</div></div>'
        f'<div class="axis">{escape(plot.axis)}{", logarithmic upwards" if log else ""}</div></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    ticks: Sequence[float]
    log: bool


def _linear_scale(values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-30):
        low, high = low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(number * step, 12) for number in range(first, last + 1)]
    return _Scale(ticks[0], ticks[-1], ticks, False)


def _log_scale(values: Sequence[float]) -> _Scale:
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = max(1, math.ceil((last - first) / 6))
    return _Scale(10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, every)], True)


def _y(scale: _Scale, value: float) -> float:
    if scale.log:
        value = max(value, scale.low)
        share = (math.log10(value) - math.log10(scale.low)) / (math.log10(scale.high) - math.log10(scale.low))
    else:
        share = (value - scale.low) / (scale.high - scale.low)
    return round(400 * (1 - share), 1)


def _x(index: int, places: int) -> float:
    return round(1000 * (index + 0.5) / places, 1)


def _drawn(line: Line, index: int, scale: _Scale, places: int) -> list[str]:
    style = _style(index)
    drawn = []
    if line.low and line.high:
        edge = [
            (_x(at, places), _y(scale, low), _y(scale, high))
            for at, (low, high) in enumerate(zip(line.low, line.high, strict=True))
            if low is not None and high is not None
        ]
        around = [f"{x} {high}" for x, _, high in edge] + [f"{x} {low}" for x, low, _ in reversed(edge)]
        if around:
            drawn.append(f'<path class="band {style}" d="M{"L".join(around)}Z"/>')
    points = [(_x(at, places), _y(scale, value)) for at, value in enumerate(line.values) if value is not None]
    if points:
        drawn.append(f'<path class="line {style}" d="M{"L".join(f"{x} {y}" for x, y in points)}"/>')
    if len(points) <= 60:
        drawn.append(f'<path class="points {style}" d="{"".join(f"M{x} {y}h0" for x, y in points)}"/>')
    return drawn


def _style(index: int) -> str:
    return f"c{index % COLOURS}" + (" dashed" if index // COLOURS % 2 else "")


def _x_labels(places: Sequence[str]) -> str:
    every = max(1, math.ceil(len(places) / 8))
    labels = [(index, places[index]) for index in range(0, len(places), every)]
    return "".join(
        f'<span style="left:{_x(index, len(places)) / 10:.2f}%">{escape(name)}</span>' for index, name in labels
    )


def _tick(value: float, form: str) -> str:
    if form == "share":
        return f"{value * 100:.4g}%"
    if form == "count" and value >= 1:
        return numbers.count(value)
    said = f"{value:.3g}"
    if "e" in said:
        factor, _, power = said.partition("e")
        return f"{'' if factor == '1' else factor + '·'}10<sup>{int(power)}</sup>".replace("-", "−")
    return said


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _thinned(plot: Plot) -> Plot:
    """The same with at most MOST_POINTS places, each the median of its neighbours."""
    if len(plot.places) <= MOST_POINTS:
        return plot
    edges = [round(index * len(plot.places) / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    groups = list(pairwise(edges))

    def thin(values: Sequence[float | None]) -> list[float | None]:
        return [median(values[begin:end]) for begin, end in groups] if values else []

    return Plot(
        plot.title,
        plot.note,
        [plot.places[begin] for begin, _ in groups],
        plot.axis,
        [Line(line.name, thin(line.values), thin(line.low), thin(line.high)) for line in plot.lines],
        plot.form,
        plot.log,
        plot.span,
    )


def bars(title: str, note: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars.

    Args:
        title, note: as of a :class:`Plot`.
        rows: name, length and what is written beside it.
    """
    longest = max((value for _, value, _ in rows), default=0.0)
    if longest <= 0:
        return ""
    inside = "".join(
        f'<dt>{escape(name)}</dt><dd><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * value / longest:.2f}" height="10"/></svg><b>{escape(said)}</b></dd>'
        for name, value, said in rows
    )
    return (
        f'<figure class="plot"><figcaption><h3>{escape(title)}</h3><p>{escape(note)}</p></figcaption>'
        f'<dl class="bars">{inside}</dl></figure>'
    )
