"""The pictures of the page, all in one style; the same data gives the same file."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from PIL import Image

from benchmarks.experiments import block_size, outliers
from benchmarks.records import Row
from benchmarks.report import speed
from benchmarks.report.groups import METHODS
from benchmarks.report.markdown import number

# Okabe and Ito's colours, told apart by colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999"
_COLORS = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY)
_MARKERS = "osD^v"
_SHADES = 128  # in a file: a palette keeps it small
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
}


def draw(name: str, rows: list[Row], path: Path) -> None:
    """Write one picture of :data:`benchmarks.report.page.PICTURES` as PNG, from its records."""
    with mpl.rc_context(_STYLE):
        drawn = BytesIO()
        _DRAWN[name](rows).savefig(drawn, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(_SHADES).save(path, optimize=True)


def _figure(height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, height))
    return figure, figure.subplots(1, columns, **options)


def _powers_of_two(axes: Axes, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(list(map(str, values)))


def _width(rows: list[Row]) -> Figure:
    figure, axes = _figure(4.2)
    series = speed.width_series(rows)
    colors = {METHODS["thanos"]: _BLUE, METHODS["sparsegpt"]: _ORANGE, METHODS["paper"]: _GREEN}
    for marker, (name, points) in zip(_MARKERS, series.items(), strict=False):
        slope = speed.exponent(points)
        label = name if slope is None else f"{name}: b$^{{{slope:.2f}}}$"
        style = "--" if name == speed.PRODUCT else "-"
        axes.plot(*zip(*points, strict=True), style, color=colors.get(name, _GREY), marker=marker, label=label)
    axes.set_yscale("log")
    _powers_of_two(axes, sorted({width for points in series.values() for width, _ in points}))
    axes.set(xlabel="width b of a square layer", ylabel="seconds")
    axes.legend(loc="lower right")
    return figure


def _steps(rows: list[Row]) -> Figure:
    bars = speed.step_bars(rows)
    patterns = list(dict.fromkeys(name.partition(", ")[2] for name, _ in bars))
    places = [place + 0.6 * patterns.index(name.partition(", ")[2]) for place, (name, _) in enumerate(bars)]
    figure, axes = _figure(0.9 + 0.23 * (places[-1] + 1))
    names, ends = [name for name, _ in bars], [0.0] * len(bars)
    for step, color in zip((*speed.STEPS, "rest"), (*_COLORS, "#cccccc"), strict=True):
        values = [parts[step] for _, parts in bars]
        axes.barh(places, values, left=ends, color=color, label=step, height=0.75)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for place, end in zip(places, ends, strict=True):
        axes.annotate(number(end), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=f"GE, one layer of {speed.shape_of(speed.usual_layer(rows)[0])}", xlim=(0, 1.1 * max(ends)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(speed.STEPS) + 1, fontsize=9)
    return figure


def _lines(axes: Axes, series: dict[str, list[tuple[int, float]]]) -> None:
    for (name, points), color, marker in zip(series.items(), _COLORS, _MARKERS, strict=False):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
    _powers_of_two(axes, sorted({size for points in series.values() for size, _ in points}))
    axes.set_xlabel("block size B")


def _block_time(rows: list[Row]) -> Figure:
    figure, axes = _figure(3.4)
    _lines(axes, speed.block_time_series(rows))
    axes.set_ylabel(f"GE, {rows[0]['columns']} columns")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _block_size(rows: list[Row]) -> Figure:
    figure, (left, right) = _figure(3.4, 2)
    series = block_size.series(rows)
    best = {name: min(score for _, score, _ in points) for name, points in series.items()}
    _lines(left, {name: [(size, score / best[name] - 1) for size, score, _ in p] for name, p in series.items()})
    _lines(right, {name: [(size, seconds) for size, _, seconds in points] for name, points in series.items()})
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    left.set_ylabel("perplexity above the lowest")
    right.set_ylabel("seconds of pruning")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(series))
    return figure


def _outliers(rows: list[Row]) -> Figure:
    maps = outliers.shares(rows)
    figure, panels = _figure(1.6 + 0.13 * len(maps["energy_share"]), 2, sharey=True)
    titles = {"energy_share": "share of the output energy", "loss_share": "share of the loss at α = 0"}
    shades = mpl.colormaps["cividis"].with_extremes(bad="white")
    for axes, (share, title) in zip(panels, titles.items(), strict=True):
        cells = [[float("nan") if value is None else value for value in line] for line in maps[share]]
        image = axes.imshow(cells, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(outliers.KINDS)), [kind.removesuffix("_proj") for kind in outliers.KINDS])
        axes.grid(visible=False)
    panels[0].set_ylabel("decoder block")
    figure.colorbar(image, ax=panels, format=PercentFormatter(1), label="in the outlier rows")
    return figure


_DRAWN: dict[str, Callable[[list[Row]], Figure]] = {
    "width": _width,
    "steps": _steps,
    "block_time": _block_time,
    "block_size": _block_size,
    "outliers": _outliers,
}
