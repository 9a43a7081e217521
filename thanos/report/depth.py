"""What changes from block to block, as plots: losses, sparsity, the tokens that reach experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thanos.report.figures import Line, Plot, html, median
from thanos.report.read import Run, as_number

Value = Callable[[Mapping[str, Any]], float | None]
_MOST_KINDS = 16


def depth_plots(run: Run) -> list[str]:
    """The plots of one run; those without values are left out."""
    blocks = _blocks([run])
    experts = any(place.expert is not None for place in run.places)
    spread = " The band spans the experts, the line is their median." if experts else ""
    plots = [
        Plot(
            "Relative loss",
            "Squared error of a layer's output, over the square of the output; lower is better." + spread,
            blocks,
            "block",
            _by_kind(run, blocks, field("relative_loss")),
            log=True,
        ),
        Plot(
            "Sparsity",
            "Zeros among the weights of a layer, counted." + spread,
            blocks,
            "block",
            _by_kind(run, blocks, field("sparsity")),
            form="share",
            span=(0.0, 1.0),
        ),
    ]
    if experts:
        plots.append(
            Plot(
                "Tokens per expert",
                "Calibration tokens routed to each expert: from the fewest to the most, and the median.",
                blocks,
                "block",
                _by_kind(run, blocks, field("tokens"), experts_only=True),
                form="count",
                log=True,
            )
        )
    if run.raised:
        raised = {layer["name"] for layer in run.raised}
        plots.append(
            Plot(
                "Layers with more damping",
                "Share of a block's layers whose factorisation failed with the damping asked for.",
                blocks,
                "block",
                _by_block(run, blocks, lambda layer: float(layer["name"] in raised)),
                form="share",
                span=(0.0,),
            )
        )
    if any(run.outliers(layer) for layer in run.layers):
        plots.append(
            Plot(
                "Outlier rows",
                "Rows of a layer that were left untouched.",
                blocks,
                "block",
                _by_kind(run, blocks, lambda layer: _float(run.outliers(layer))),
                form="count",
            )
        )
    return [html(plot) for plot in plots]


def compared_plots(runs: Sequence[Run], titles: Sequence[str]) -> list[str]:
    """Runs over one another: a line each, the median of a block's layers."""
    blocks = _blocks(runs)
    plots = []
    for title, note, value, options in (
        ("Relative loss", "The median layer of each block; lower is better.", "relative_loss", {"log": True}),
        ("Sparsity", "The median layer of each block.", "sparsity", {"form": "share", "span": (0.0, 1.0)}),
    ):
        lines = []
        for run, name in zip(runs, titles, strict=True):
            found = _grouped(run, field(value))
            merged: dict[str, list[float]] = {}
            for by_block in found.values():
                for block, values in by_block.items():
                    merged.setdefault(block, []).extend(values)
            lines.append(Line(name, [median(merged.get(block, [])) for block in blocks]))
        plots.append(html(Plot(title, note, blocks, "block", lines, **options)))
    return plots


def field(name: str) -> Value:
    """A number of a layer, by its name in the record."""
    return lambda layer: as_number(layer.get(name))


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)


def _blocks(runs: Sequence[Run]) -> list[str]:
    found = {place.block for run in runs for place in run.places}
    return [str(block) for block in sorted(block for block in found if block is not None)] + ["–"] * (None in found)


def _grouped(run: Run, value: Value, experts_only: bool = False) -> dict[str, dict[str, list[float]]]:
    """Values by kind of layer and by block."""
    found: dict[str, dict[str, list[float]]] = {}
    for layer, place in zip(run.layers, run.places, strict=True):
        number = value(layer)
        if number is None or (experts_only and place.expert is None):
            continue
        block = "–" if place.block is None else str(place.block)
        found.setdefault(place.kind, {}).setdefault(block, []).append(number)
    return found


def _by_block(run: Run, blocks: Sequence[str], value: Value) -> list[Line]:
    """One line, the mean over a block's layers."""
    merged: dict[str, list[float]] = {}
    for by_block in _grouped(run, value).values():
        for block, values in by_block.items():
            merged.setdefault(block, []).extend(values)
    return [
        Line("all layers", [sum(merged[block]) / len(merged[block]) if block in merged else None for block in blocks])
    ]


def _by_kind(run: Run, blocks: Sequence[str], value: Value, experts_only: bool = False) -> list[Line]:
    grouped = _grouped(run, value, experts_only)
    names = list(grouped)
    if len(names) > _MOST_KINDS:  # the rest in one line
        rest: dict[str, list[float]] = {}
        for name in names[_MOST_KINDS - 1 :]:
            for block, values in grouped.pop(name).items():
                rest.setdefault(block, []).extend(values)
        grouped["others"] = rest
    lines = []
    for name, by_block in grouped.items():
        several = any(len(values) > 1 for values in by_block.values())
        lines.append(
            Line(
                name,
                [median(by_block.get(block, [])) for block in blocks],
                [min(by_block[block]) if block in by_block else None for block in blocks] if several else (),
                [max(by_block[block]) if block in by_block else None for block in blocks] if several else (),
            )
        )
    return lines
