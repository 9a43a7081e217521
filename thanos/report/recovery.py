"""A record that goes on: what training did to a model after it was pruned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thanos.report.card import CARD, card, carried
from thanos.report.page import PAGE, write_page
from thanos.report.read import run_of
from thanos.report.record import FILE_NAME, json_numbers


def continued(
    record: Mapping[str, Any],
    recovery: Mapping[str, Any],
    layers: Mapping[str, tuple[tuple[int, int], int]],
    effective_sparsity: float,
) -> dict[str, Any]:
    """The record of a model that was trained.

    Args:
        record: of the pruning; empty where there was none.
        recovery: what training did, plain values; it comes last in the record's ``recovery``.
        layers: by name the shape and the zeros, counted, of each layer whose zeros were kept.
        effective_sparsity: zeros over all weights of the blocks, counted.
    """
    entries = {str(entry["name"]): dict(entry) for entry in record.get("layers", [])}
    for name, (shape, zeros) in layers.items():
        counted = {"shape": list(shape), "zeros": zeros, "sparsity": zeros / (shape[0] * shape[1])}
        entries[name] = {"name": name, **entries.get(name, {}), **counted}
    earlier = record.get("recovery") or []
    return {
        **record,
        "effective_sparsity": effective_sparsity,
        "layers": list(entries.values()),
        "recovery": [*earlier, dict(recovery)],
    }


def write_recovered(record: Mapping[str, Any], folder: Path, *, title: str) -> None:
    """Write ``pruning.json`` and ``report.html``, and, of a model that was pruned by this package, ``README.md``.

    Args:
        record: of :func:`continued`.
        folder: where the model was saved; the license and languages of a card that lies there are kept.
        title: what the run is called, such as the name of its directory.
    """
    values = json_numbers(dict(record))
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
    run = run_of(title, values)
    write_page(run, folder / PAGE)
    if run.text("method"):
        (folder / CARD).write_text(card(run, carried(folder / CARD)), encoding="utf-8")
