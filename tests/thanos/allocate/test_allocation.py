"""Every allocation keeps the total exactly and empties no layer; each finds what it promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thanos.allocate import (
    MOST,
    Curve,
    SearchState,
    curvature,
    fit_total,
    lamp,
    layer_curve,
    owl,
    search_counts,
    uniform,
)
from thanos.allocate.lamp import lamp_scores
from thanos.allocate.moves import shifted
from thanos.allocate.owl import outlier_share

quick = settings(max_examples=30, deadline=None)
layers = st.lists(st.integers(1, 3000), min_size=1, max_size=8).map(
    lambda sizes: {f"l{i}": n for i, n in enumerate(sizes)}
)
shares = st.floats(0, 0.99)


def check(found: dict[str, int], sizes: dict[str, int], sparsity: float) -> None:
    assert sum(found.values()) == sum(uniform(sizes, sparsity).values())
    for name, size in sizes.items():
        assert 0 <= found[name] <= max(MOST, sparsity) * size


@quick
@given(sizes=layers, sparsity=shares, data=st.data())
def test_any_wanted_shares_are_fitted_to_the_total(sizes: dict, sparsity: float, data: st.DataObject) -> None:
    wanted = {name: data.draw(st.floats(-3, 3)) for name in sizes}
    check(fit_total(wanted, sizes, sparsity), sizes, sparsity)


@quick
@given(sizes=layers, sparsity=shares, data=st.data())
def test_owl_and_curvature_and_exchanges_keep_the_total(sizes: dict, sparsity: float, data: st.DataObject) -> None:
    outliers = {name: data.draw(st.floats(0, 0.2)) for name in sizes}
    check(owl(outliers, sizes, sparsity), sizes, sparsity)
    curves = {name: Curve((0.3, 0.6), tuple(sorted(data.draw(st.tuples(shares, shares))))) for name in sizes}
    check(curvature(curves, sizes, sparsity), sizes, sparsity)
    start = SearchState(uniform(sizes, sparsity))
    tried: list[dict[str, int]] = []

    def evaluate(counts: dict[str, int]) -> float:
        tried.append(dict(counts))
        return -len(tried)

    search_counts(start, sizes, sparsity, evaluate, 6, exchange=0.3)
    for counts in tried:
        check(counts, sizes, sparsity)


@quick
@given(sparsity=st.floats(0, 0.9), seed=st.integers(0, 1000))
def test_lamp_is_one_threshold_on_its_scores(sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(20, 30, generator=generator) * 2**power for power, name in enumerate("abc")}
    weights["a"] = weights["a"] ** 3  # heavier tails: more of it may go
    sizes = {name: weight.numel() for name, weight in weights.items()}
    found = lamp(weights.items(), sparsity)
    check(found, sizes, sparsity)
    scores = {name: lamp_scores(weight) for name, weight in weights.items()}
    total = sum(found.values())
    if total:
        threshold = torch.cat(list(scores.values())).sort().values[total - 1]
        for name, own in scores.items():
            assert abs(found[name] - int((own <= threshold).sum())) <= 0.02 * sizes[name] + 2
    assert found["a"] >= found["b"]


def test_lamp_scores_by_the_definition() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    torch.testing.assert_close(lamp_scores(weight), torch.tensor([0.0, 1 / 14, 4 / 13, 1.0]))
    assert (lamp_scores(torch.zeros(2, 2)) == 0).all()


def test_owl_takes_less_where_outliers_are_many_and_groups_share() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 2000}
    found = owl({"a": 0.01, "b": 0.03, "c": 0.02}, sizes, 0.5, spread=0.1)
    assert found["a"] / 1000 - found["b"] / 1000 == pytest.approx(0.2, abs=0.002)
    found = owl({"a": 0.01, "b": 0.05, "c": 0.02}, sizes, 0.5, groups={"a": "x", "b": "x", "c": "y"})
    assert abs(found["a"] - found["b"]) <= 2
    weight = torch.ones(10, 10)
    weight[0, 0] = 100
    assert outlier_share(weight, torch.ones(10)) == pytest.approx(0.01)


def test_curvature_is_the_cheapest_split() -> None:
    sizes = {"a": 20, "b": 20, "c": 20}
    curves = {name: Curve((0.5, 0.8), (loss, 6 * loss)) for name, loss in zip("abc", (1.0, 2.0, 8.0), strict=True)}

    def cost(counts: tuple[int, ...]) -> float:
        return sum(curves[name].at(count / 20) for name, count in zip("abc", counts, strict=True))

    found = curvature(curves, sizes, 0.5)
    best = min(cost(counts) for counts in product(range(20), repeat=3) if sum(counts) == 30)
    assert cost(tuple(found.values())) == pytest.approx(best, rel=1e-6)
    assert found["a"] > found["b"] > found["c"]


def test_a_curve_passes_through_its_points_and_is_measured_relatively() -> None:
    curve = layer_curve(lambda sparsity: 8 * sparsity**2, energy=4.0, sparsities=(0.25, 0.5))
    assert curve.losses == (0.125, 0.5)
    assert [curve.at(s) for s in (0.0, 0.25, 0.5)] == pytest.approx([0.0, 0.125, 0.5])
    assert curve.at(0.9) > curve.at(0.6) > 0.5
    assert layer_curve(lambda sparsity: 1.0, energy=0.0).losses == (0.0,) * 4


def test_a_search_finds_a_better_split_and_resumes_to_the_same_end() -> None:
    sizes = {"a": 1000, "b": 1000, "c": 500}
    best = {"a": 0.7, "b": 0.35, "c": 0.4}

    def evaluate(counts: dict[str, int]) -> float:
        return sum((counts[name] / sizes[name] - best[name]) ** 2 for name in sizes)

    states: list[SearchState] = []
    start = SearchState(uniform(sizes, 0.5))
    whole = search_counts(start, sizes, 0.5, evaluate, 60, saved=states.append)
    assert whole.score < 0.2 * evaluate(start.counts)
    assert search_counts(states[17], sizes, 0.5, evaluate, 60) == whole
    assert whole.evaluations == 60
    never = search_counts(start, sizes, 0.5, lambda counts: math.nan, 5)
    assert never.counts == start.counts


def test_a_search_follows_the_gains_first_and_resumes_among_them() -> None:
    sizes = {f"l{number}": 1000 + 100 * number for number in range(12)}
    weights = {name: 4.0 ** (number % 5) for number, name in enumerate(sizes)}

    def evaluate(counts: Mapping[str, int]) -> float:
        return sum(weights[name] * math.exp(8 * counts[name] / sizes[name]) for name in sizes)

    def gains(counts: Mapping[str, int]) -> dict[str, float]:
        return {name: weights[name] * 8 * math.exp(8 * counts[name] / sizes[name]) / sizes[name] for name in sizes}

    start, states = SearchState(uniform(sizes, 0.5)), list[SearchState]()
    whole = search_counts(start, sizes, 0.5, evaluate, 16, gains=gains, saved=states.append)
    known = list(gains(whole.counts).values())
    assert max(known) < 1.1 * min(known)
    drawn = search_counts(start, sizes, 0.5, evaluate, 16)
    assert whole.score < 0.5 * drawn.score
    for state in states[:-1]:
        assert search_counts(state, sizes, 0.5, evaluate, 16, gains=gains) == whole
    assert search_counts(start, sizes, 0.5, evaluate, 16, gains=lambda counts: None).counts == drawn.counts


@quick
@given(sizes=layers, sparsity=shares, step=st.floats(0, 2), data=st.data())
def test_shifts_keep_the_total_whatever_the_gains(
    sizes: dict[str, int], sparsity: float, step: float, data: st.DataObject
) -> None:
    gains = {name: data.draw(st.floats() | st.floats(-1, 1)) for name in sizes}
    check(shifted(uniform(sizes, sparsity), gains, sizes, sparsity, step), sizes, sparsity)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform({"a": 5}, 1.0), "sparsity must be at least 0 and less than 1"),
        (lambda: uniform({}, 0.5), "at least one layer"),
        (lambda: fit_total({"a": math.nan}, {"a": 5}, 0.5), "a: the share to remove must be a finite number"),
        (lambda: fit_total({"b": 0.1}, {"a": 5}, 0.5), "must name the same layers"),
        (lambda: owl({"a": 0.1}, {"a": 5}, 0.5, spread=-1), "the spread must be"),
        (lambda: Curve((0.5, 0.3), (1, 2)), "rising sparsities"),
        (lambda: Curve((0.5,), (math.inf,)), "finite and not negative"),
        (lambda: curvature({"b": Curve((0.5,), (1,))}, {"a": 5}, 0.5), "must name the same layers"),
        (lambda: search_counts(SearchState({"a": 1}), {"a": 5}, 0.5, len, 0), "at least one evaluation"),
        (lambda: search_counts(SearchState({"a": 1}), {"a": 5}, 0.5, len, 1, exchange=0), "the exchange must be"),
        (lambda: search_counts(SearchState({"b": 1}), {"a": 5}, 0.5, len, 1), "the same layers"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
