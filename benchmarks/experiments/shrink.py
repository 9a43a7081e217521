"""Smaller models: which axis to cut first, at the same share of the blocks' weights, and against removed columns."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.lab import MULTIPLE, scored_twice
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.records import Records, Row
from benchmarks.report.groups import METHODS, pattern_name
from benchmarks.report.markdown import NOTHING, number, percent, table

# In SmolLM2-135M a feed-forward channel is 0.049% of a block, three query heads (one a group) 6.2%, a group 8.3%.
_SHARES: dict[str, tuple[str, ...]] = {
    "10%": ("channels:0.135", "heads:3", "kv-heads:1", "depth:3", "channels:0.052+heads:3"),
    "20%": (
        "channels:0.27", "kv-heads:2", "depth:6", "channels:0.135+depth:3", "channels:0.18+heads:3",
        "channels:0.156+kv-heads:1",
    ),
    "30%": (
        "channels:0.4", "depth:9", "channels:0.27+depth:3", "channels:0.135+depth:6", "channels:0.32+heads:3",
        "channels:0.22+heads:3+depth:3",
    ),
}  # fmt: skip
_DENSE = Run("dense", None)
_STRUCTURED = ("thanos", "sparsegpt", "wanda", "magnitude")


def _runs() -> list[Run]:
    """The dense model, every axis and mix at every share, and the ways to remove columns of each layer at one."""
    smaller = [Run(pattern=pattern, source=TRAINING) for patterns in _SHARES.values() for pattern in patterns]
    columns = [Run(method, "structured:0.2", source=TRAINING) for method in _STRUCTURED]
    return [_DENSE, *smaller, *columns, replace(columns[0], alpha=0.1)]


def section(found: Records) -> list[str]:
    """A table a share, the best in bold, and the smaller models beside those with columns removed."""
    rows = {Run(**row["run"]): row for row in found.rows}
    dense = rows.get(_DENSE, {})
    text = [
        "Channels of the feed-forwards, query heads (`heads:3`: one of each group), groups with their key and value "
        "heads (`kv-heads`) and blocks, alone and together, at about the same share of the weights of the blocks. "
        "*Held out* is the perplexity on the last eighth of the C4 sample, from which no calibration sample is drawn. "
        f"All are ordinary, smaller models; widths in multiples of {MULTIPLE}. Dense: "
        f"{number(dense.get('perplexity'))}, held out {number(dense.get('held_out'))}. In bold, the lowest of a table.",
    ]
    for share, patterns in _SHARES.items():
        runs = [Run(pattern=pattern, source=TRAINING) for pattern in patterns]
        text += [f"### About {share} fewer weights", _table({run: rows[run] for run in runs if run in rows})]
    columns = {run: row for run, row in rows.items() if _keeps_shape(run)}
    if columns:
        text.append(
            "### Against columns removed from every layer\n\nThe `structured:` pattern at the same share, on the same "
            "samples; it leaves the shape of the model as it is."
        )
        text.append(_table(columns))
    return text


def _keeps_shape(run: Run) -> bool:
    return str(run.pattern).startswith("structured")


def _table(rows: dict[Run, Row]) -> str:
    best = min((row["perplexity"] for row in rows.values() if row["perplexity"] is not None), default=None)
    lines = []
    for run, row in rows.items():
        score = number(row["perplexity"]) if row["perplexity"] is not None else "not finite"
        removed = f"`{run.pattern}`"
        if _keeps_shape(run):
            outliers = f", α = {run.alpha:g}" if run.alpha else NOTHING
            removed = f"{METHODS[run.method]}, {pattern_name(run.pattern)}{outliers}"
        shown = f"**{score}**" if row["perplexity"] == best else score
        seconds = number(row.get("seconds", {}).get("total"))
        lines.append([removed, percent(row["effective_sparsity"]), shown, number(row["held_out"]), seconds])
    return table(["removed", "of the weights", "perplexity", "held out", "seconds"], lines)


EXPERIMENT = Experiment(_runs(), {"Smaller models: which axis first?": section}, measure=scored_twice)
