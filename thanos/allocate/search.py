"""Search: move sparsity between layers at a constant total, and keep what measures better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from thanos.allocate.moves import exchanged, shifted

SHIFT = 0.06  # of shares, for each factor of e between gains; halved where that is no better
_LEAST = 0.005  # a shift below that is not worth an evaluation
EXCHANGE = 0.05  # of a group's weights; it falls to a quarter over the budget

Gains = Callable[[Mapping[str, int]], Mapping[str, float] | None]


@dataclass(frozen=True)
class SearchState:
    """Where a search stands; written down after each evaluation, it goes on from there to the same end.

    Attributes:
        counts: how many weights each layer loses, the best so far.
        score: of these; infinite before the first evaluation.
        evaluations: how many were made.
        accepted: how many moves were kept.
        shift: how far the next move goes along the gains.
    """

    counts: Mapping[str, int]
    score: float = math.inf
    evaluations: int = 0
    accepted: int = 0
    shift: float = SHIFT


def search_counts(
    state: SearchState,
    sizes: Mapping[str, int],
    sparsity: float,
    evaluate: Callable[[Mapping[str, int]], float],
    budget: int,
    *,
    gains: Gains | None = None,
    exchange: float = EXCHANGE,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    saved: Callable[[SearchState], None] | None = None,
) -> SearchState:
    """Try moves until ``budget`` evaluations are made in all; the total never changes.

    The first evaluation scores the start. Then sparsity is shifted all at once to where the next weights are worth
    least, as long as that makes the score fall, by half as much where it does not. What is left of the budget goes to
    exchanges between two groups, drawn by the seed and the evaluation's number alone. A score that is not finite is
    never kept.

    Args:
        state: ``SearchState(counts)`` of any allocation, or where an earlier search stopped.
        sizes: weights by layer.
        sparsity: of the whole, for the most a layer may lose.
        evaluate: the lower the better, such as the KL divergence of the pruned model from the dense one.
        budget: evaluations in all, those of ``state`` included.
        gains: by how much the score falls for a weight fewer removed, by layer, at some counts; None (or None as the
            answer) where that cannot be told, and all of the budget goes to exchanges.
        exchange: the share of the smaller group's weights that moves at first; it falls to a quarter over the budget.
        groups: the group of each layer, for instance its sub-block; None: each layer by itself.
        saved: called after each evaluation with the new state.

    Raises:
        ValueError: the budget is below one evaluation, the exchange not above 0 and at most 1, or names differ.
    """
    if budget < 1:
        raise ValueError(f"the search needs a budget of at least one evaluation, not {budget}")
    if not 0 < exchange <= 1:
        raise ValueError(f"the exchange must be above 0 and at most 1, not {exchange}")
    if state.counts.keys() != sizes.keys():
        raise ValueError("the search must start from counts of the same layers as the sizes")
    members: dict[str, list[str]] = {}
    for name in sizes:
        members.setdefault(groups[name] if groups is not None else name, []).append(name)
    known: Mapping[str, float] | None = None  # the gains at the state's counts
    while state.evaluations < budget:
        number, trial = state.evaluations, state.counts
        if number and gains is not None and known is None and state.shift >= _LEAST:
            known = gains(state.counts)
            if known is None:
                state = replace(state, shift=0.0)
        shifts = number > 0 and known is not None and state.shift >= _LEAST
        if shifts and known is not None:
            trial = shifted(state.counts, known, sizes, sparsity, state.shift)
        elif number and len(members) > 1:
            part = exchange * (1 - 0.75 * number / budget)
            trial = exchanged(state.counts, sizes, sparsity, members, part, seed * 1_000_003 + number)
        score = evaluate(trial)
        state = replace(state, evaluations=number + 1)
        if math.isfinite(score) and score < state.score:
            state = replace(state, counts=dict(trial), score=score, accepted=state.accepted + (number > 0))
            known = None
        elif shifts:
            state = replace(state, shift=state.shift / 2)
        if saved is not None:
            saved(state)
    return state
