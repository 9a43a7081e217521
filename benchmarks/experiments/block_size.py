"""Which block size: Thanos by the columns of a block."""

from __future__ import annotations

from statistics import mean

from benchmarks.experiments.experiment import Experiment, tabled
from benchmarks.experiments.run import Run
from benchmarks.records import Row
from benchmarks.report.groups import groups, pattern_name
from benchmarks.report.markdown import number

SIZES = (8, 32, 64, 128, 256, 576)  # 576 takes all inputs of SmolLM2-135M's attention and MLP at once


def series(rows: list[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """For each pattern, (block size, perplexity, seconds of pruning)."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for group in groups(rows):
        scores = [score for score in group.values("perplexity") if score is not None]
        if scores and group.run.block_size is not None and group.first:
            point = (group.run.block_size, mean(scores), group.first["seconds"]["prune"])
            found.setdefault(pattern_name(group.run.pattern), []).append(point)
    return {pattern: sorted(points) for pattern, points in found.items()}


EXPERIMENT = Experiment(
    [Run(pattern=pattern, block_size=size) for pattern in ("0.5", "4:8", "2:4") for size in SIZES],
    {
        "Which block size?": tabled(
            "Thanos with blocks of B columns. One seed: the main table has the deviation over several.",
            "pattern",
            ("B", lambda group: group.run.block_size),
            "perplexity",
            ("seconds of pruning", lambda group: number(group.seconds("prune"))),
            ("of the whole walk", lambda group: number(group.seconds())),
        )
    },
    picture="block_size",
)
