"""Rows of experiments: grouped over seeds, named, and traced to machine and settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.grid import PATTERNS, Run
from benchmarks.report.markdown import listing
from benchmarks.report.read import Experiment, Row

METHODS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "thanos": "Thanos",
    "paper": "the paper's algorithm",
}


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but the seed."""

    run: Run
    rows: dict[int, Row]  # by seed

    @property
    def perplexities(self) -> list[float | None]:
        return [row["perplexity"] for row in self.rows.values()]

    @property
    def sparsity(self) -> float:
        """The mean effective sparsity."""
        return sum(row["effective_sparsity"] for row in self.rows.values()) / len(self.rows)

    @property
    def first(self) -> Row:
        """The row of seed 0, or an empty one."""
        return self.rows.get(0, {})

    @property
    def seconds(self) -> float | None:
        """Of the whole walk of seed 0."""
        return (self.first.get("seconds") or {}).get("total")


def groups(experiment: Experiment, **fields: Any) -> list[Group]:
    """The experiment's runs that have these fields, in the order of the experiment."""
    found: dict[Run, dict[int, Row]] = {}
    for row in experiment.rows:
        if all(row["run"][key] == value for key, value in fields.items()):
            run = Run(**{**row["run"], "seed": 0})
            found.setdefault(run, {})[row["run"]["seed"]] = row
    return [Group(run, dict(sorted(rows.items()))) for run, rows in found.items()]


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


def home(run: Run) -> str | None:
    """The pattern in whose table a run belongs: an unstructured run at another sparsity stands in that of 50%."""
    return run.pattern if run.pattern in PATTERNS or run.pattern is None else PATTERNS[0]


def provenance(experiment: Experiment) -> str:
    """The command, the settings and the machines of an experiment, and how much of it there is."""
    s = experiment.settings
    texts = [
        f"Made by `{experiment.command}`: {s['model']} in {s['dtype']}, calibrated on `{s['calibration']}`, perplexity "
        f"on the first {s['evaluation_tokens']} tokens of `{s['evaluation']}` in windows of {s['window']}.",
        *machines(row["environment"] for row in experiment.rows),
    ]
    if len(experiment.rows) < experiment.planned:
        texts.append(
            f"**Not complete**: {len(experiment.rows)} of {experiment.planned} runs are there; the command goes on "
            "where it stopped."
        )
    return "\n".join(texts)


def machines(environments: Iterable[Row]) -> list[str]:
    """One sentence for each different machine."""
    return list(dict.fromkeys(f"Machine: {_machine(environment)}." for environment in environments if environment))


def _machine(environment: Row) -> str:
    parts = [str(environment.get("processor", "unnamed processor"))]
    for key in ("cores", "threads"):
        if key in environment:
            parts.append(f"{environment[key]} {key if environment[key] != 1 else key[:-1]}")
    if "memory_bytes" in environment:
        parts.append(f"{environment['memory_bytes'] / 2**30:.0f} GiB of memory")
    versions = {"python": "Python", "torch": "PyTorch", "transformers": "Transformers", "thanos": "Thanos"}
    known = {**environment, "thanos": environment.get("thanos", environment.get("thanos-pruning"))}
    return ", ".join([*parts, *(f"{name} {known[key]}" for key, name in versions.items() if known.get(key))])
