"""The presets beside SparseGPT and Wanda, ours and llm-compressor's: what to take, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.experiments.experiment import Experiment, grouped
from benchmarks.experiments.lab import Lab
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.memory import peak_bytes
from benchmarks.records import Records, Row
from benchmarks.report.groups import Group, groups, pattern_name, run_name
from benchmarks.report.markdown import NOTHING, number, table
from thanos.options import QUALITIES

_PATTERNS = ("0.5", "2:4")
SAMPLES = 64
_DENSE = Run("dense", None)


def _runs() -> list[Run]:
    """The cheap ones first, so that there is something to compare the long ones with."""
    presets = [Run(quality=quality, samples=SAMPLES, source=TRAINING) for quality in QUALITIES]
    rivals = [
        Run(method, engine=engine, samples=SAMPLES, source=TRAINING)
        for engine in ("thanos", "llmcompressor")
        for method in ("wanda", "sparsegpt")
    ]
    runs = [*rivals[:2], *presets, *rivals[2:]]
    return [_DENSE, *(replace(run, pattern=pattern) for run in runs for pattern in _PATTERNS)]


def measure(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """Both perplexities, and by how much the process grew while it pruned."""
    pruned: list[tuple[Any, Row]] = []
    peak = peak_bytes(lambda: pruned.append(lab.prune(run)), interval=0.01)
    model, fields = pruned[0]
    memory = {} if run == _DENSE else {"peak_bytes": peak}
    accuracy = {"zero_shot": lab.zero_shot(model)} if zero_shot else {}
    return [{**fields, **memory, **lab.perplexities(model), **accuracy}]


def section(found: Records) -> list[str]:
    """A table for each pattern."""
    text = [
        f"Calibrated on {SAMPLES} samples of 512 tokens from the first seven eighths of the C4 sample, one seed. "
        "Perplexity on WikiText-2 and on the last eighth of the C4 sample, and zero-shot accuracy over "
        f"{found.head['settings']['zero_shot_limit']} documents of each task. Seconds of the whole walk, and by how "
        "many GB the process grew in it."
    ]
    own = groups(found.rows)
    for pattern in _PATTERNS:
        if block := [group for group in own if group.run.pattern == pattern]:
            dense = [group for group in own if group.run.method == "dense"]
            text += [f"### {pattern_name(pattern).capitalize()} by each preset", _table(dense + block)]
    return text


def _table(block: list[Group]) -> str:
    return grouped(
        block,
        ("method", _name),
        ("WikiText-2", lambda group: number(group.first["perplexity"])),
        ("held-out C4", lambda group: number(group.first["held_out"])),
        "zero-shot, %",
        "seconds",
        ("GB", lambda group: number(group.first["peak_bytes"] / 1e9) if "peak_bytes" in group.first else NOTHING),
    )


def _name(group: Group) -> str:
    run = group.run
    preset = f", {run.quality}" if run.method == "thanos" else ""
    return ("llm-compressor's " if run.engine == "llmcompressor" else "") + run_name(run) + preset


def readme_table(found: Records) -> str:
    """A row for each method; both texts and the seconds for each pattern."""
    by_name: dict[str, dict[str | None, Group]] = {}
    for group in groups(found.rows):
        by_name.setdefault(_name(group), {})[group.run.pattern] = group
    rows = []
    for name, of in by_name.items():
        row = [f"**{name}**" if name.startswith("Thanos") else name]
        for pattern in _PATTERNS:
            group = of.get(pattern, of.get(None))
            values = [] if group is None else [group.first["perplexity"], group.first["held_out"], group.seconds()]
            row += [number(value) for value in values] or [NOTHING] * 3
        rows.append(row)
    parts = [f"{pattern_name(pattern)}, {what}" for pattern in _PATTERNS for what in ("WikiText-2", "C4", "s")]
    return table(["perplexity", *parts], rows)


EXPERIMENT = Experiment(_runs(), {"Which preset?": section}, measure=measure, zero_shot=True)
