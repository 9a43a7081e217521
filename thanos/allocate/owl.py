"""OWL: less from layers with many outliers (Yin and others, 2024)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from thanos.allocate.total import fit_total, total_count

THRESHOLD = 5.0
SPREAD = 0.08


def outlier_share(weight: Tensor, norms: Tensor, threshold: float = THRESHOLD) -> float:
    """The share of a layer's ``abs(w_ij) * norm_j`` beyond ``threshold`` times their mean (OWL's D, with its M).

    Args:
        weight: (c, b), floating.
        norms: (b,), ``sqrt(H_jj)``, the root mean square of each input.
    """
    scores = weight.abs().to(norms.dtype) * norms
    return float((scores > threshold * scores.mean()).double().mean())


def owl(
    shares: Mapping[str, float],
    sizes: Mapping[str, int],
    sparsity: float,
    *,
    spread: float = SPREAD,
    groups: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """How many weights each layer loses: the larger its share of outliers, the fewer.

    The shares are mapped linearly onto an interval of width ``2 spread`` and turned around; then all move together
    until the total is kept.

    Args:
        shares: of outliers by layer, see :func:`outlier_share`.
        sizes: weights by layer.
        sparsity: of the whole.
        spread: lambda: half the difference between the most and the least pruned.
        groups: the group of each layer, for instance its block, as in the paper: layers of a group lose the same share,
            by the mean of their shares over weights. None: each layer by itself.

    Raises:
        ValueError: the spread is negative, or as :func:`fit_total`.
    """
    if not 0 <= spread <= 1:
        raise ValueError(f"the spread must be from 0 to 1, not {spread}")
    total_count(sizes, sparsity)
    if groups is not None:
        shares = _by_group(shares, sizes, groups)
    low, high = min(shares.values()), max(shares.values())
    width = high - low or 1.0
    return fit_total({name: -2 * spread * (share - low) / width for name, share in shares.items()}, sizes, sparsity)


def _by_group(shares: Mapping[str, float], sizes: Mapping[str, int], groups: Mapping[str, str]) -> dict[str, float]:
    weights: dict[str, int] = {}
    outliers: dict[str, float] = {}
    for name, share in shares.items():
        weights[groups[name]] = weights.get(groups[name], 0) + sizes[name]
        outliers[groups[name]] = outliers.get(groups[name], 0.0) + share * sizes[name]
    return {name: outliers[groups[name]] / weights[groups[name]] for name in shares}
