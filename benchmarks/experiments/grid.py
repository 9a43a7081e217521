"""What each experiment runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

SEEDS = (0, 1, 2)
PATTERNS = ("0.5", "structured:0.3", "4:8", "2:4")
# Every tenth decoder block left dense: alpha = 0 at the effective sparsity that alpha = 0.1 leaves n:m.
A_TENTH_DENSE = r"layers\.(9|19|29)\."


@dataclass(frozen=True)
class Run:
    """One pruned model: the options of :func:`thanos.prune_model`, and the calibration samples."""

    method: str = "thanos"
    pattern: str | None = "0.5"
    alpha: float = 0.0
    block_size: int | None = None
    metric: str | None = None
    exclude: str | None = None
    source: str = "c4"
    samples: int = 32
    length: int = 512
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


DENSE = Run("dense", None)


def _each_seed(runs: Iterable[Run]) -> list[Run]:
    runs = list(runs)
    return [replace(run, seed=seed) for seed in SEEDS for run in runs]


def main_table() -> list[Run]:
    """Every method at every pattern, Thanos with alpha too; where that lowers the sparsity, alpha = 0 matched to it."""
    runs = [DENSE]
    for pattern in PATTERNS:
        runs.append(Run("magnitude", pattern))
        varied = [Run(method, pattern) for method in ("wanda", "sparsegpt", "thanos")]
        varied.append(Run("thanos", pattern, alpha=0.1))
        if pattern == "0.5":
            varied += [Run(method, "0.45") for method in ("sparsegpt", "thanos")]
        elif ":" in pattern and not pattern.startswith("structured"):
            varied.append(Run("thanos", pattern, exclude=A_TENTH_DENSE))
        runs += _each_seed(varied)
    return runs


def block_sizes() -> list[Run]:
    """B = 576 takes all the columns of SmolLM2-135M's attention and MLP inputs at once."""
    sizes = (8, 32, 64, 128, 256, 576)
    return [Run(pattern=pattern, block_size=size) for pattern in ("0.5", "4:8", "2:4") for size in sizes]


def alphas() -> list[Run]:
    choices = (0.0, 0.02, 0.05, 0.1, 0.2)
    return _each_seed(Run(pattern=p, alpha=alpha) for p in ("structured:0.3", "2:4") for alpha in choices)


def metrics() -> list[Run]:
    """The paper's metric is None, so that the runs are those of the main table."""
    patterns, choices = ("0.5", "2:4"), (None, "obs", "magnitude")
    return _each_seed(Run(pattern=p, metric=metric) for p in patterns for metric in choices)


def calibrations() -> list[Run]:
    runs = [Run(samples=samples) for samples in (8, 16, 32, 64, 128)]
    runs += [Run(samples=16384 // length, length=length) for length in (128, 256, 512, 1024, 2048)]
    runs += [Run(source=source) for source in ("c4", "wikitext2", "builtin")]
    return _each_seed(dict.fromkeys(runs))


def outlier_rows() -> list[Run]:
    return [Run(pattern="structured:0.3", alpha=0.1)]


EXPERIMENTS = {
    "main": main_table,
    "block_size": block_sizes,
    "alpha": alphas,
    "metric": metrics,
    "calibration": calibrations,
    "outliers": outlier_rows,
}
