"""How much calibration, and on what: number, length and source of the samples."""

from __future__ import annotations

from operator import attrgetter

from benchmarks.experiments.experiment import Experiment, grouped
from benchmarks.experiments.run import Run, each_seed
from benchmarks.records import Records
from benchmarks.report.groups import SEEDS_OF, groups, pattern_name

USUAL = Run()
TOKENS = USUAL.samples * USUAL.length
PARTS: list[tuple[str, str, list[Run]]] = [
    (
        f"Number of samples of {USUAL.length} tokens:",
        "samples",
        [Run(samples=samples) for samples in (8, 16, 32, 64, 128)],
    ),
    (
        f"Length of the samples, {TOKENS} tokens in all:",
        "length",
        [Run(samples=TOKENS // length, length=length) for length in (128, 256, 512, 1024, 2048)],
    ),
    (
        f"Source of {USUAL.samples} samples of {USUAL.length} tokens (`wikitext2`: the second half of the test text, "
        "which is not scored):",
        "source",
        [Run(source=source) for source in ("builtin", "c4", "wikitext2")],
    ),
]


def section(found: Records) -> list[str]:
    measured = {group.run: group for group in groups(found.rows)}
    text = f"Thanos at {pattern_name(USUAL.pattern)}. {SEEDS_OF}; seconds of the first."
    parts = []
    for title, column, runs in PARTS:
        kept = [measured[run] for run in runs if run in measured]
        tokens = ("tokens", lambda group: group.run.samples * group.run.length)
        if kept:
            value = (column, attrgetter(f"run.{column}"))
            parts.append(f"{title}\n\n" + grouped(kept, value, tokens, "perplexity", "seconds"))
    return [text, *parts]


EXPERIMENT = Experiment(
    each_seed(dict.fromkeys(run for _, _, runs in PARTS for run in runs)),
    {"How much calibration, and on what?": section},
)
