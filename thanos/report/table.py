"""The table of layers: its columns as JSON, of which ``page.js`` shows the rows that are in sight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from thanos.report.read import Run, as_number

# Name in the record, heading, form, and what it means.
_COLUMNS = (
    ("sparsity", "sparsity", "share", "zeros among its weights, counted"),
    ("relative_loss", "relative loss", "small", "squared error of its output over the square of the output"),
    ("loss", "loss", "small", "mean squared error of its output, per token"),
    ("damping", "damping", "small", "added to the Hessian's diagonal, relative to its mean"),
    ("tokens", "tokens", "count", "calibration tokens that it was pruned on"),
    ("pool_share", "pool share", "share", "of an expert: what it took from the tokens of all experts"),
    ("zeros", "zeros", "count", "weights that are zero"),
)
_OWN = {"name", "shape", "seconds", "shared_with", "outlier_rows", *(column[0] for column in _COLUMNS)}


def layer_table(runs: Sequence[Run], titles: Sequence[str] = ()) -> str:
    """The table of one run's layers; of several: one column a run for loss and for sparsity."""
    columns = _columns(runs[0]) if len(runs) == 1 else _compared(runs, titles)
    if not columns or not columns[0]["values"]:
        return ""
    data = json.dumps(columns, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    rows = len(columns[0]["values"])
    return (
        '<div class="layers"><div class="tools"><label>Filter <input type="search" placeholder="down_proj, layers.3, '
        'relative loss &gt; 0.02" aria-describedby="filter-help" autocomplete="off" spellcheck="false"></label>'
        f'<output>{rows:,} layers</output></div><p id="filter-help" class="help">Words that a name holds, or a column '
        "compared with a number. A click on a heading sorts.</p>"
        '<div class="scroller" tabindex="0" role="region" aria-label="Layers"><table><thead></thead><tbody></tbody>'
        f"</table></div><noscript>The table needs JavaScript; pruning.json holds the same.</noscript>"
        f'<script type="application/json" id="layers">{data}</script></div>'
    )


def _column(name: str, label: str, form: str, help: str, values: Sequence[Any]) -> dict[str, Any]:
    return {"name": name, "label": label, "form": form, "help": help, "values": values}


def _columns(run: Run) -> list[dict[str, Any]]:
    layers = run.layers
    columns = [_column("name", "layer", "text", "its name in the model", [layer["name"] for layer in layers])]
    shapes = ["" if not layer.get("shape") else "{} × {}".format(*layer["shape"]) for layer in layers]
    if any(shapes):
        columns.append(_column("shape", "shape", "text", "output features × input features", shapes))
    known = list(_COLUMNS)
    if any(run.outliers(layer) for layer in layers):
        columns.append(
            _column(
                "outlier_rows",
                "outlier rows",
                "count",
                "rows left untouched",
                [run.outliers(layer) for layer in layers],
            )
        )
    extra = {
        key for layer in layers for key, value in layer.items() if key not in _OWN and as_number(value) is not None
    }
    known += [(key, key.replace("_", " "), "small", key) for key in sorted(extra)]
    for key, label, form, help in known:
        values = [_number(layer.get(key)) for layer in layers]
        if any(value is not None for value in values) and not (key == "pool_share" and not any(values)):
            columns.append(_column(key, label, form, help, values))
    times = [_number(sum(as_number(part) or 0.0 for part in (layer.get("seconds") or {}).values())) for layer in layers]
    if any(times):
        columns.append(_column("seconds", "seconds", "small", "its Hessian and its pruning", times))
    return columns


def _compared(runs: Sequence[Run], titles: Sequence[str]) -> list[dict[str, Any]]:
    by_name: list[Mapping[str, Mapping[str, Any]]] = [{layer["name"]: layer for layer in run.layers} for run in runs]
    names = list(dict.fromkeys(name for layers in by_name for name in layers))
    columns = [_column("name", "layer", "text", "its name in the model", names)]
    for key, label, form in (("relative_loss", "relative loss", "small"), ("sparsity", "sparsity", "share")):
        for title, layers in zip(titles, by_name, strict=True):
            values = [_number(layers.get(name, {}).get(key)) for name in names]
            if any(value is not None for value in values):
                columns.append(_column(f"{key}:{title}", f"{label}, {title}", form, f"{label} in {title}", values))
    return columns


def _number(value: Any) -> float | int | None:
    number = as_number(value)
    if number is None:
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else float(f"{number:.6g}")
