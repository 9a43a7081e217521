"""Equal marginal loss: the cheapest split of the total by each layer's own curve of loss over sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from thanos.allocate.total import most_of, total_count

SPARSITIES = (0.3, 0.5, 0.7, 0.85)
_STEPS = 400  # of the grid on which a curve is read


@dataclass(frozen=True)
class Curve:
    """A layer's loss at some sparsities, in a unit that layers share (the loss over the layer's energy, for instance).

    Attributes:
        sparsities: rising, above 0 and below 1.
        losses: zero or more, one for each.

    Raises:
        ValueError: the numbers are no such curve.
    """

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in zip((0.0, *self.sparsities), (*self.sparsities, 1.0), strict=True))
        if not self.sparsities or len(self.sparsities) != len(self.losses) or not rising:
            raise ValueError(f"a curve needs one loss for each of some rising sparsities between 0 and 1, not {self}")
        if not all(0 <= loss < math.inf for loss in self.losses):
            raise ValueError(f"a curve's losses must be finite and not negative, not {self.losses}")

    def at(self, sparsity: float) -> float:
        """The loss: its logarithm is straight between the points and beyond the last; a cube below the first.

        An independent choice of the smallest of many normal weights removes a loss like the cube of the share.
        """
        first, tiny = self.sparsities[0], 1e-30
        if sparsity <= first or len(self.sparsities) == 1:
            return self.losses[0] * (sparsity / first) ** 3
        k = next((k for k, known in enumerate(self.sparsities) if sparsity <= known), len(self.sparsities) - 1)
        low, high = self.sparsities[k - 1], self.sparsities[k]
        below, above = (math.log(max(loss, tiny)) for loss in self.losses[k - 1 : k + 1])
        return math.exp(below + max(0.0, above - below) * (sparsity - low) / (high - low))


def layer_curve(loss_at: Callable[[float], float], energy: float, sparsities: Sequence[float] = SPARSITIES) -> Curve:
    """A layer's curve of relative losses.

    Args:
        loss_at: the loss of the layer pruned to a sparsity; one factor serves all calls.
        energy: ``tr(W H W.T)``, the layer's mean squared output per token, which the losses are divided by.
        sparsities: where the curve is measured.
    """
    scale = 1 / energy if energy > 0 else 0.0
    return Curve(tuple(sparsities), tuple(max(0.0, loss_at(sparsity)) * scale for sparsity in sparsities))


def curvature(curves: Mapping[str, Curve], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """How many weights each layer loses where the sum of the curves is least at the same total.

    Each curve is read on a grid and replaced by the largest convex one below it; then the steps of least loss for each
    weight are taken, from all the layers together, until the total is reached. On convex curves that is the optimum:
    there every layer would lose as much by the next weight.

    Args:
        curves: by layer.
        sizes: weights by layer, the same names.
        sparsity: of the whole.

    Raises:
        ValueError: names differ, or as :func:`thanos.allocate.total.total_count`.
    """
    left = total_count(sizes, sparsity)
    if curves.keys() != sizes.keys():
        raise ValueError(
            f"curves and sizes must name the same layers; these differ: {sorted(curves.keys() ^ sizes.keys())}"
        )
    steps: list[tuple[float, str, int]] = []
    for name, curve in curves.items():
        most = most_of(sizes[name], sparsity)
        points = [most * step // _STEPS for step in range(_STEPS + 1)]
        corners = lower_hull([(count, curve.at(count / sizes[name])) for count in dict.fromkeys(points)])
        for (low, below), (high, above) in pairwise(corners):
            steps.append(((above - below) / (high - low), name, high - low))
    found = dict.fromkeys(sizes, 0)
    for _, name, count in sorted(steps, key=lambda step: step[0]):  # stable: a layer's own steps stay in their order
        taken = min(count, left)
        found[name] += taken
        left -= taken
    return found


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the largest convex function below ``points``, which come in rising order."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull
