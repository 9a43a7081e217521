"""What is written beside a pruned model: the record, the page, the model card and the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thanos.checkpoint.size import saved_size
from thanos.report.card import CARD, card, carried
from thanos.report.page import PAGE, write_page
from thanos.report.read import run_of
from thanos.report.recipe import RECIPE, write_recipe
from thanos.report.record import ModelReport, json_numbers


def write_files(
    report: ModelReport, folder: Path, *, source: Path | None, recipe: Mapping[str, Any], title: str
) -> ModelReport:
    """Write ``pruning.json``, ``report.html``, ``README.md`` and ``recipe.yaml``.

    Args:
        report: of the run.
        folder: where the pruned model was saved; a card of the source's that lies there is replaced, and its license
            and languages are kept.
        source: the directory or the file of the model that was pruned; None where it is not on this disk.
        recipe: the command's options by their names; ``passes`` becomes what the run took.
        title: what the run is called, such as the name of its directory.

    Returns:
        The report with the sizes of the saved weights.
    """
    before, after = saved_size(source), saved_size(folder)
    if "became" not in report.options and before["parameters"] is None:
        before["parameters"] = after["parameters"]  # of the same shape
    size = {name: {"before": before[name], "after": after[name]} for name in before}
    report = dataclasses.replace(report, size=size)
    report.write(folder)
    run = run_of(title, json_numbers(report.to_dict()))
    write_page(run, folder / PAGE)
    (folder / CARD).write_text(card(run, carried(folder / CARD)), encoding="utf-8")
    if "passes" in report.options:
        recipe = {**{name: value for name, value in recipe.items() if name != "passes"}, "passes": report.passes}
    write_recipe(recipe, folder / RECIPE)
    return report
