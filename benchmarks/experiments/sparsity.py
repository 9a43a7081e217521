"""How far compensation pays: Wanda and Thanos from a tenth of the weights to half of them, on two texts."""

from __future__ import annotations

from itertools import product

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.lab import scored_twice
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.records import Records, Row
from benchmarks.report.groups import METHODS
from benchmarks.report.markdown import NOTHING, number, percent, table

_DENSE = Run("dense", None)
_SHARES = ("0.1", "0.2", "0.3", "0.4", "0.5")
_METHODS = ("wanda", "thanos")


def section(found: Records) -> list[str]:
    """A row for each sparsity, both texts of every method side by side."""
    rows = {Run(**row["run"]): row for row in found.rows}
    text = (
        "Perplexity on WikiText-2, and behind it on the last eighth of the C4 sample, from which no calibration sample "
        "is drawn. Wanda chooses as Thanos does and leaves the other weights as they are."
    )
    lines = [["0%", *[_told(rows.get(_DENSE))] * len(_METHODS)]]
    for share in _SHARES:
        found_here = [rows.get(Run(method, share, source=TRAINING)) for method in _METHODS]
        lines.append([percent(float(share), 0), *map(_told, found_here)])
    return [text, table(["sparsity", *(METHODS[method] for method in _METHODS)], lines)]


def _told(row: Row | None) -> str:
    return NOTHING if row is None else f"{number(row['perplexity'])}, {number(row['held_out'])}"


_RUNS = [_DENSE, *(Run(method, share, source=TRAINING) for share, method in product(_SHARES, _METHODS))]
EXPERIMENT = Experiment(_RUNS, {"At which sparsity does compensation pay?": section}, measure=scored_twice)
