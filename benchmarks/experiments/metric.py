"""Which mask metric: what Thanos chooses the weights by."""

from __future__ import annotations

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.run import Run, each_seed
from benchmarks.records import Records
from benchmarks.report.groups import SEEDS_OF, groups, pattern_name
from benchmarks.report.markdown import NOTHING, spread, table

NAMES = {None: "Wanda's, abs(w)·‖x‖ (the default)", "obs": "OBS, w² / [H⁻¹]ⱼⱼ", "magnitude": "magnitude, abs(w)"}


def section(found: Records) -> list[str]:
    cells = {(group.run.metric, group.run.pattern): group for group in groups(found.rows)}
    patterns = list(dict.fromkeys(pattern for _, pattern in cells))
    rows = []
    for metric in dict.fromkeys(metric for metric, _ in cells):
        here = [cells.get((metric, pattern)) for pattern in patterns]
        scores = [spread(group.values("perplexity")) if group else NOTHING for group in here]
        rows.append([NAMES.get(metric, metric), *scores, max(len(group.rows) for group in here if group)])
    text = f"By what Thanos chooses the weights to remove; the compensation is the same. {SEEDS_OF}."
    return [text, table(["metric", *map(pattern_name, patterns), "runs"], rows)]


EXPERIMENT = Experiment(
    # The paper's metric is None, so that the runs are those of the main table.
    each_seed(Run(pattern=pattern, metric=metric) for pattern in ("0.5", "2:4") for metric in NAMES),
    {"Which mask metric?": section},
)
