"""Search: exchange sparsity between layers at a constant total, and keep what measures better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from thanos.allocate.total import most_of

STEP = 0.05


@dataclass(frozen=True)
class SearchState:
    """Where a search stands; written down after each evaluation, it goes on from there to the same end.

    Attributes:
        counts: how many weights each layer loses, the best so far.
        score: of these; infinite before the first evaluation.
        evaluations: how many were made.
        accepted: how many exchanges were kept.
    """

    counts: Mapping[str, int]
    score: float = math.inf
    evaluations: int = 0
    accepted: int = 0


def exchange_search(
    state: SearchState,
    sizes: Mapping[str, int],
    sparsity: float,
    evaluate: Callable[[Mapping[str, int]], float],
    budget: int,
    *,
    step: float = STEP,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    saved: Callable[[SearchState], None] | None = None,
) -> SearchState:
    """Try exchanges until ``budget`` evaluations are made in all; the total never changes.

    The first evaluation scores the start. Each later one moves up to ``step`` of the smaller group's weights from one
    group to another, drawn by the seed and the evaluation's number alone, and keeps the move where the score falls. A
    score that is not finite is never kept.

    Args:
        state: ``SearchState(counts)`` of any allocation, or where an earlier search stopped.
        sizes: weights by layer.
        sparsity: of the whole, for the most a layer may lose.
        evaluate: the lower the better, such as the KL divergence of the pruned model from the dense one.
        budget: evaluations in all, those of ``state`` included.
        step: the share exchanged at first; it falls to a quarter over the budget.
        groups: the group of each layer, for instance its sub-block; None: each layer by itself.
        saved: called after each evaluation with the new state.

    Raises:
        ValueError: the budget is below one evaluation, the step not above 0 and at most 1, or names differ.
    """
    if budget < 1:
        raise ValueError(f"the search needs a budget of at least one evaluation, not {budget}")
    if not 0 < step <= 1:
        raise ValueError(f"the step must be above 0 and at most 1, not {step}")
    if state.counts.keys() != sizes.keys():
        raise ValueError("the search must start from counts of the same layers as the sizes")
    members: dict[str, list[str]] = {}
    for name in sizes:
        members.setdefault(groups[name] if groups is not None else name, []).append(name)
    while state.evaluations < budget:
        number = state.evaluations
        trial = state.counts
        if number and len(members) > 1:
            trial = _exchanged(
                state.counts, sizes, sparsity, members, step * (1 - 0.75 * number / budget), seed, number
            )
        score = evaluate(trial)
        state = replace(state, evaluations=number + 1)
        if math.isfinite(score) and score < state.score:
            state = replace(state, counts=dict(trial), score=score, accepted=state.accepted + (number > 0))
        if saved is not None:
            saved(state)
    return state


def _exchanged(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    sparsity: float,
    members: Mapping[str, list[str]],
    step: float,
    seed: int,
    number: int,
) -> dict[str, int]:
    generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + number)
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
