"""Changes of an allocation at a constant total: what a search tries."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from thanos.allocate.total import fit_total, most_of

_FLOOR = 0.05  # of the mean gain: less, or none at all, counts as so much


def shifted(
    counts: Mapping[str, int], gains: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, step: float
) -> dict[str, int]:
    """Counts at the same total with less removed where the next weights are worth more.

    If the loss by a layer grows like ``exp(a p)`` with its sparsity p, all layers lose as much by the next weight once
    each p is lower by ``log(gain / mean gain) / a``; so shares move by ``step`` times that logarithm.

    Args:
        gains: what is gained by a weight fewer removed, by layer; not finite counts as the mean.
        sizes: weights by layer, the same names.
        sparsity: of the whole.
    """
    known = {name: max(0.0, gain) for name, gain in gains.items() if math.isfinite(gain)}
    mean = sum(gain * sizes[name] for name, gain in known.items()) / max(1, sum(sizes[name] for name in known))
    if not mean > 0:
        return dict(counts)
    ratios = {name: max(known.get(name, mean) / mean, _FLOOR) for name in sizes}
    wanted = {name: counts[name] / size - step * math.log(ratios[name]) for name, size in sizes.items()}
    return fit_total(wanted, sizes, sparsity)


def exchanged(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    sparsity: float,
    members: Mapping[str, list[str]],
    step: float,
    seed: int,
) -> dict[str, int]:
    """Counts with up to ``step`` of the smaller group's weights moved from one group of layers to another.

    Args:
        sizes: weights by layer, the same names.
        sparsity: of the whole, for the most a layer may lose.
        members: the layers of each of at least two groups.
        seed: which two are drawn.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    names = list(members)
    order = torch.randperm(len(names), generator=generator, dtype=torch.int64, device="cpu").tolist()
    giver, taker = (members[names[index]] for index in order[:2])
    room = sum(most_of(sizes[name], sparsity) - counts[name] for name in taker)
    there = sum(counts[name] for name in giver)
    amount = min(room, there, math.ceil(step * min(sum(sizes[n] for n in giver), sum(sizes[n] for n in taker))))
    trial = dict(counts)
    _spread(trial, giver, -amount, {name: counts[name] for name in giver})
    _spread(trial, taker, amount, {name: most_of(sizes[name], sparsity) - counts[name] for name in taker})
    return trial


def _spread(counts: dict[str, int], names: list[str], amount: int, room: Mapping[str, int]) -> None:
    """Share ``amount`` out by the room there is; what rounding leaves goes to the first with room."""
    sign, left, total = (1 if amount > 0 else -1), abs(amount), sum(room.values())
    shares = {name: abs(amount) * room[name] // max(1, total) for name in names}
    left -= sum(shares.values())
    for name in names:
        more = min(left, room[name] - shares[name])
        counts[name] += sign * (shares[name] + more)
        left -= more
