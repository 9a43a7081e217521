"""The stages beyond the paper: what each gives alone and together, on two texts, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.experiments.experiment import Experiment, tabled
from benchmarks.experiments.lab import scored_twice
from benchmarks.experiments.run import TRAINING, Run, each_seed
from benchmarks.report.groups import SEEDS_OF
from benchmarks.report.markdown import NOTHING, number, spread
from thanos.options import ALLOCATIONS, REFINEMENTS, TARGETS

_NOTE = (
    "Perplexity on WikiText-2 and on the last eighth of the C4 sample, from which no calibration sample is drawn: a "
    f"stage that gains on the second text alone has learnt the calibration's kind of text. {SEEDS_OF}."
)


def _often(run: Run) -> bool:
    """Whether a run is repeated with other calibration samples: of the two main patterns, and of few samples."""
    return run.pattern in ("0.5", "2:4") and (not run.reconstruct or run.samples == Run.samples)


def _told(value: object) -> object:
    return NOTHING if value is None else value


def _experiment(heading: str, text: str, runs: Iterable[Run], *columns: str) -> Experiment:
    named = [(name, lambda group, name=name: _told(getattr(group.run, name))) for name in columns]
    section = tabled(
        f"{text} {_NOTE}",
        "pattern",
        *named,
        "perplexity",
        ("held-out C4", lambda group: spread(group.values("held_out"))),
        "runs",
        ("seconds", lambda group: number(group.seconds())),
    )
    return Experiment(each_seed(runs, _often), {heading: section}, measure=scored_twice)


REFINE = _experiment(
    "What do refits, mask searches and corrected targets give?",
    "Each stage alone and together, without reconstruction. Of n:m patterns blocks have about 512 columns, and "
    "128 with a refit; the rows that name a block size have the other one.",
    [
        *(
            Run(pattern=pattern, refine=refine, targets=targets, source=TRAINING)
            for pattern in ("0.5", "0.6", "0.7", "2:4", "4:8", "structured:0.3")
            for targets in TARGETS
            for refine in REFINEMENTS
        ),
        *(
            Run(pattern=pattern, refine=refine, block_size=size, source=TRAINING)
            for pattern in ("2:4", "4:8")
            for refine, size in (("none", 128), ("refit", 512))
        ),
    ],
    "refine",
    "targets",
    "block_size",
)

RECONSTRUCT = _experiment(
    "What does the reconstruction of blocks give?",
    "By epochs and samples of 512 tokens, after a refit towards corrected targets.",
    [
        Run(pattern=pattern, refine="refit", targets="corrected", reconstruct=epochs, samples=samples, source=TRAINING)
        for pattern in ("0.5", "2:4")
        for samples in (32, 64)
        for epochs in (0, 2, 4)
    ],
    "reconstruct",
    "samples",
)

ALLOCATION = _experiment(
    "Where to remove how much?",
    "The same number of weights in all, shared out among the layers by each choice; the method alone.",
    [
        Run(pattern=pattern, allocation=allocation, source=TRAINING)
        for pattern in ("0.5", "0.6", "0.7")
        for allocation in ALLOCATIONS
    ],
    "allocation",
)
