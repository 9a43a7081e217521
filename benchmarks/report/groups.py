"""Records of experiments: grouped over seeds, named, in columns, and traced to their settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.run import PATTERNS, Run
from benchmarks.machine import sentences
from benchmarks.records import Records, Row
from benchmarks.report.markdown import NOTHING, accuracy, listing, number, percent, spread

METHODS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "thanos": "Thanos",
    "paper": "the paper's algorithm",
}
SEEDS_OF = "Perplexity as mean ± standard deviation over the calibration seeds, where there are several"


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but the seed."""

    run: Run
    rows: dict[int, Row]  # by seed

    def values(self, field: str) -> list[Any]:
        """Of each seed."""
        return [row[field] for row in self.rows.values()]

    @property
    def sparsity(self) -> float:
        """The mean effective sparsity."""
        return sum(self.values("effective_sparsity")) / len(self.rows)

    @property
    def first(self) -> Row:
        """The row of seed 0, or an empty one."""
        return self.rows.get(0, {})

    def seconds(self, part: str = "total") -> float | None:
        """Of the walk of seed 0."""
        return self.first.get("seconds", {}).get(part)


def groups(rows: list[Row]) -> list[Group]:
    """The records of pruned models, in the order of the experiment."""
    found: dict[Run, dict[int, Row]] = {}
    for row in rows:
        run = Run(**{**row["run"], "seed": 0})
        found.setdefault(run, {})[row["run"].get("seed", 0)] = row
    return [Group(run, dict(sorted(by_seed.items()))) for run, by_seed in found.items()]


def run_name(run: Run, *, alpha: bool = True) -> str:
    """The method and, in brackets, what sets the run apart from others of its pattern; ``alpha`` can be left out."""
    apart = [f"α = {run.alpha:g}"] if alpha and run.alpha else []
    if run.exclude:
        apart.append(f"blocks {listing(re.findall(r'[0-9]+', run.exclude))} dense")
    if run.pattern and run.pattern not in PATTERNS:
        apart.append(pattern_name(run.pattern))
    return METHODS[run.method] + (f" ({', '.join(apart)})" if apart else "")


def pattern_name(pattern: str | None) -> str:
    if not pattern:
        return "dense"
    kind, _, share = pattern.rpartition(":")
    if kind and kind != "structured":
        return pattern
    return f"{kind or 'unstructured'} {float(share):.0%}"


def _average(group: Group) -> str:
    """Over the zero-shot tasks, of seed 0."""
    zero_shot = group.first.get("zero_shot")
    return accuracy(zero_shot["average"]) if zero_shot else NOTHING


Column = Callable[[Group], object]
COLUMNS: dict[str, Column] = {
    "method": lambda group: run_name(group.run),
    "pattern": lambda group: pattern_name(group.run.pattern),
    "α": lambda group: f"{group.run.alpha:g}",
    "effective sparsity": lambda group: percent(group.sparsity, 2),
    "perplexity": lambda group: spread(group.values("perplexity")),
    "runs": lambda group: len(group.rows),
    "zero-shot, %": _average,
    "seconds": lambda group: number(group.seconds()),
}


def provenance(found: Records, planned: int) -> str:
    """The command, the settings and the machines of an experiment, and how much there is of its ``planned`` runs."""
    s, there = found.head["settings"], len({Run(**row["run"]) for row in found.rows})
    texts = [
        f"Made by `{found.head['command']}`: {s['model']} in {s['dtype']}, calibrated on `{s['calibration']}`, "
        f"perplexity on the first {s['evaluation_tokens']} tokens of `{s['evaluation']}` in windows of {s['window']}.",
        *sentences(found.rows),
    ]
    if there < planned:
        texts.append(f"**Not complete**: {there} of {planned} runs are there; the command goes on where it stopped.")
    return "\n".join(texts)
