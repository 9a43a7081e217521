"""The total that every allocation keeps, and the most that it may take from one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

MOST = 0.95
"""No layer loses more than this share of its weights, or than the total share where that is more: none is emptied."""


def total_count(sizes: Mapping[str, int], sparsity: float) -> int:
    """``sum of floor(p n)`` over layers of n weights: what a uniform allocation removes.

    Raises:
        ValueError: there is no layer, a layer is empty, or the sparsity is not at least 0 and less than 1.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and less than 1, not {sparsity}")
    if not sizes or min(sizes.values()) < 1:
        raise ValueError("an allocation needs at least one layer, and no layer without weights")
    share = Fraction(repr(float(sparsity)))
    return sum(math.floor(share * size) for size in sizes.values())


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The same share of each layer: how many weights each of ``sizes`` (weights by layer) loses."""
    total_count(sizes, sparsity)
    return {name: math.floor(Fraction(repr(float(sparsity))) * size) for name, size in sizes.items()}


def most_of(size: int, sparsity: float) -> int:
    """The most weights that a layer of ``size`` may lose where the whole loses the share ``sparsity``."""
    return math.floor(Fraction(repr(float(max(MOST, sparsity)))) * size)


def fit_total(wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The counts nearest to wanted shares that keep the total exactly: all shares moved by one number, then clipped.

    Args:
        wanted: the share of its weights that each layer should lose; any finite numbers.
        sizes: weights by layer, the same names.
        sparsity: of the whole.

    Returns:
        How many weights each layer loses: from 0 to :data:`MOST` of them, together those of :func:`uniform`.

    Raises:
        ValueError: names differ, a share is not finite, or as :func:`total_count`.
    """
    total = total_count(sizes, sparsity)
    if wanted.keys() != sizes.keys():
        raise ValueError(
            f"shares and sizes must name the same layers; these differ: {sorted(wanted.keys() ^ sizes.keys())}"
        )
    for name, share in wanted.items():
        if not math.isfinite(share):
            raise ValueError(f"{name}: the share to remove must be a finite number, not {share}")

    def counts(shift: float) -> dict[str, int]:
        return {
            name: min(max(math.floor((wanted[name] + shift) * size), 0), most_of(size, sparsity))
            for name, size in sizes.items()
        }

    low, high = -max(wanted.values()) - 1, 2 - min(wanted.values())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle).values()) <= total else (low, middle)
    found = counts(low)
    missing = total - sum(found.values())
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # what rounding left, from the largest layers
        more = min(missing, most_of(sizes[name], sparsity) - found[name])
        found[name] += more
        missing -= more
    return found
