"""How many outlier rows: Thanos by the share alpha of rows left dense."""

from benchmarks.experiments.experiment import Experiment, tabled
from benchmarks.experiments.run import Run, each_seed
from benchmarks.report.groups import SEEDS_OF

EXPERIMENT = Experiment(
    each_seed(Run(pattern=p, alpha=alpha) for p in ("structured:0.3", "2:4") for alpha in (0.0, 0.02, 0.05, 0.1, 0.2)),
    {
        "How many outlier rows (α)?": tabled(
            "Thanos with a share α of the rows of each layer, those with the largest outputs, left untouched. "
            "Structured pruning makes up for them in the other rows; n:m cannot, so its effective sparsity falls with "
            f"α. {SEEDS_OF}; seconds of the first.",
            *("pattern", "α", "effective sparsity", "perplexity", "seconds"),
        )
    },
)
