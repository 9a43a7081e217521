"""The removal of columns against the same in naive steps, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos.shrink.removal import cheapest_columns, cheapest_groups, without_columns


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a damped Hessian of correlated inputs, and the factor U of its inverse."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    hessian = inputs.T @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, hessian, kernels.inverse_factor(hessian, 0.0)[0]


def naive(weight: Tensor, hessian: Tensor, groups: list[list[int]], count: int) -> tuple[Tensor, list[int], float]:
    """Remove the cheapest group, update W and G, again and again: the update with its inverses spelled out."""
    weight, inverse = weight.clone(), torch.linalg.inv(hessian)
    gone: list[int] = []
    loss = 0.0
    for _ in range(count):
        costs = {}
        for index, group in enumerate(groups):
            if index not in gone:
                costs[index] = float(
                    (weight[:, group] @ torch.linalg.inv(inverse[group][:, group]) @ weight[:, group].T).trace()
                )
        best = min(costs, key=lambda index: costs[index])
        group = groups[best]
        step = torch.linalg.inv(inverse[group][:, group]) @ inverse[group]
        weight = weight - weight[:, group] @ step
        inverse = inverse - inverse[:, group] @ step
        gone.append(best)
        loss += costs[best]
        for index in gone:
            weight[:, groups[index]] = 0
    return weight, gone, loss


@pytest.mark.parametrize(("rows", "columns", "count"), [(20, 40, 25), (12, 110, 90), (5, 70, 69), (8, 8, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_greedy_order_and_the_update(rows: int, columns: int, count: int, dtype: torch.dtype) -> None:
    weight, hessian, upper = problem(rows, columns)
    wanted, order, loss = naive(weight, hessian, [[index] for index in range(columns)], count)
    chosen = cheapest_columns(weight.to(dtype), upper.to(dtype), count)
    removal = without_columns(weight.to(dtype), upper.to(dtype), chosen)
    assert len(set(chosen.tolist())) == count
    if dtype == torch.float64:
        assert chosen.tolist() == order
        torch.testing.assert_close(removal.weight, wanted, rtol=1e-6, atol=1e-8)
    assert removal.loss == pytest.approx(loss, rel=1e-3)
    assert bool((removal.weight[:, chosen] == 0).all())


def test_the_loss_is_that_of_the_update_and_no_other_update_has_less() -> None:
    weight, hessian, upper = problem(12, 30)
    removal = without_columns(weight, upper, torch.tensor([3, 4, 17]))
    change = removal.weight - weight
    assert removal.loss == pytest.approx(float((change @ hessian @ change.T).trace()))
    gradient = change @ hessian
    gradient[:, removal.removed] = 0
    assert float(gradient.abs().max()) < 1e-9


def test_a_metric_of_the_output_changes_the_choice() -> None:
    weight, _, upper = problem(6, 30)
    metric = torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    chosen = cheapest_columns(weight, upper, 10, metric)
    assert chosen.tolist() == cheapest_columns(weight[:1], upper, 10).tolist()


def test_fewer_candidates_come_near_to_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, upper = problem(24, 500)
    weight *= torch.linspace(0.2, 2, 500, dtype=torch.float64)  # some matter more, as in real layers
    some = without_columns(weight, upper, cheapest_columns(weight, upper, 60))  # of 316
    monkeypatch.setattr("thanos.shrink.removal._MORE", 500)
    every = without_columns(weight, upper, cheapest_columns(weight, upper, 60))
    assert some.loss == pytest.approx(every.loss, rel=0.02)


def test_columns_of_zero_go_first() -> None:
    weight, _, upper = problem(6, 30)
    weight[:, [5, 20]] = 0
    assert set(cheapest_columns(weight, upper, 2).tolist()) == {5, 20}


def test_groups_are_removed_one_of_each_class_in_every_round() -> None:
    weight, hessian, upper = problem(20, 48)
    group_of = torch.arange(48) // 8
    groups = [list(range(8 * index, 8 * index + 8)) for index in range(6)]
    _, order, loss = naive(weight, hessian, groups, 3)
    assert cheapest_groups(weight, upper, group_of, [list(range(6))], 3) == (order, pytest.approx(loss))
    chosen, _ = cheapest_groups(weight, upper, group_of, [[0, 1, 2], [3, 4, 5]], 2)
    assert sorted(index // 3 for index in chosen) == [0, 0, 1, 1]
