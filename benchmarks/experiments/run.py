"""One run of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

SEEDS = (0, 1, 2)
PATTERNS = ("0.5", "structured:0.3", "4:8", "2:4")  # of the main table
TRAINING = "c4-first"  # the source of the first seven eighths of the C4 text; the rest is held out
_SAMPLING = ("source", "samples", "length", "seed")
_ASIDE = ("engine", "recover", "minutes", "repeats")  # no matter of prune_model


@dataclass(frozen=True)
class Run:
    """One pruned model: options of :func:`thanos.prune_model`, its calibration samples, and how it is trained after.

    Records keep only what differs from the defaults here. So a new option may be added, with a default that does what
    was done without it; a default must not change.
    """

    method: str = "thanos"
    pattern: str | None = "0.5"
    alpha: float = 0.0
    block_size: int | None = None
    metric: str | None = None
    exclude: str | None = None
    refine: str = "none"
    targets: str = "own"
    reconstruct: int = 0
    allocation: str = "uniform"
    quality: str = "fast"
    values: str = "plain"
    engine: str = "thanos"  # or "llmcompressor", which prunes in our place
    recover: str | None = None
    minutes: int = 0
    repeats: float = 0.0  # the share of windows trained on whose second half repeats the first
    source: str = "c4"
    samples: int = 32
    length: int = 512
    seed: int = 0

    def told(self) -> dict[str, Any]:
        """What differs from the defaults; ``Run(**told)`` is the run."""
        return {key: value for key, value in asdict(self).items() if value != getattr(Run, key)}

    def options(self) -> dict[str, Any]:
        """The options of :func:`thanos.prune_model` beside the pattern."""
        chosen = {key: value for key, value in self.told().items() if key not in ("pattern", *_SAMPLING, *_ASIDE)}
        return {"outlier_fraction" if key == "alpha" else key: value for key, value in chosen.items()}


def each_seed(runs: Iterable[Run], of: Callable[[Run], bool] = lambda _: True) -> list[Run]:
    """All runs with the first seed, then all (of which ``of`` says so) with the second, ..."""
    runs = list(runs)
    return [replace(run, seed=seed) for seed in SEEDS for run in runs if seed == SEEDS[0] or of(run)]
