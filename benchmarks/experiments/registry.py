"""The experiments, in the order of the page."""

from benchmarks.experiments import (
    alpha,
    bits,
    block_size,
    calibration,
    main,
    metric,
    outliers,
    presets,
    recovery,
    shrink,
    sparsity,
    stages,
)

EXPERIMENTS = {
    "main": main.EXPERIMENT,
    "presets": presets.EXPERIMENT,
    "block_size": block_size.EXPERIMENT,
    "alpha": alpha.EXPERIMENT,
    "metric": metric.EXPERIMENT,
    "calibration": calibration.EXPERIMENT,
    "sparsity": sparsity.EXPERIMENT,
    "refine": stages.REFINE,
    "reconstruct": stages.RECONSTRUCT,
    "allocation": stages.ALLOCATION,
    "shrink": shrink.EXPERIMENT,
    "recovery": recovery.EXPERIMENT,
    "bits": bits.EXPERIMENT,
    "outliers": outliers.EXPERIMENT,
}
