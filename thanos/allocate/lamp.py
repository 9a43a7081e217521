"""LAMP: one threshold for all layers on a layer-adaptive magnitude score (Lee and others, 2021)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from thanos.allocate.total import fit_total

_SHIFT = (
    17  # of a float32's bits: bins of a hundredth of a score, which is as finely as a layer's share needs to be known
)
_BINS = 1 << (31 - _SHIFT)


def lamp_scores(weight: Tensor) -> Tensor:
    """Each weight's ``w^2 / sum of the squares of the layer's weights that are not smaller``, ascending, (c*b,).

    Equal weights count from the first to the last, as LAMP's sorted order has it. Float32; zeros score zero.
    """
    squares = weight.flatten().double().square().sort().values
    rest = squares.flip(0).cumsum(0).flip(0)
    return (squares / rest.clamp(min=torch.finfo(torch.float64).tiny)).float()


def lamp(layers: Iterable[tuple[str, Tensor]], sparsity: float) -> dict[str, int]:
    """How many weights each layer loses where the smallest scores of all layers go.

    Only one layer's scores are held at a time; a histogram of each finds the threshold.

    Args:
        layers: names and weights (c, b), any floating dtype; read once, one after the other.
        sparsity: of the whole.

    Raises:
        ValueError: as :func:`thanos.allocate.fit_total`.
    """
    sizes: dict[str, int] = {}
    counts: dict[str, Tensor] = {}
    for name, weight in layers:
        sizes[name] = weight.numel()
        bins = lamp_scores(weight).view(torch.int32).bitwise_right_shift(_SHIFT).long()
        counts[name] = torch.bincount(bins, minlength=_BINS).cpu()
    below = (
        torch.stack(list(counts.values())).sum(0).cumsum(0)
        if counts
        else torch.zeros(_BINS, dtype=torch.float32, device="cpu")
    )
    wanted = sparsity * sum(sizes.values())
    at = int((below < wanted).sum().clamp(max=_BINS - 1))  # the bin that the threshold lies in
    inside = int(below[at]) - (int(below[at - 1]) if at else 0)
    part = (wanted - (int(below[at]) - inside)) / max(1, inside)
    shares = {name: (int(count[:at].sum()) + part * int(count[at])) / sizes[name] for name, count in counts.items()}
    return fit_total(shares, sizes, sparsity)
