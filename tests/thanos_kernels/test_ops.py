"""The operations hold to their definitions on every CPU backend, and refuse what they cannot run with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thanos_kernels as kernels
from thanos_kernels import native

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="the extension is not built")),
]
few = settings(max_examples=25, deadline=None)


def spd(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = torch.randn(2 * size + 8, size, dtype=torch.float64)
    return (inputs.T @ inputs / len(inputs)).to(dtype)


def upper(size: int) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(spd(size)).mT.contiguous()
    return factor


def ranked_mask(scores: Tensor, count: int) -> Tensor:
    """The definition: sort by (score, flat index) in exact arithmetic, take the first ``count``."""
    values = scores.flatten().tolist()
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[sorted(range(len(values)), key=lambda i: (values[i], i))[:count]] = True
    return mask.view_as(scores)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=st.integers(0, 1 << 30))
@few
def test_row_solve_satisfies_its_equations(backend: str, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    gram, weights = spd(width), torch.randn(rows, width)
    mask = torch.rand(rows, width) < torch.rand(rows, 1)
    mask[0] = True
    mask[-1] = False
    out = torch.full((rows, width), float("nan"))
    info = torch.full((rows,), -7, dtype=torch.int32)
    kernels.row_solve_ex(gram, weights, mask, out=out, info=info, backend=backend)
    assert not info.any()
    assert not out[~mask].any()
    residual = (out.double() @ gram.double() - weights)[mask]
    assert bool((residual.abs() < 1e-3).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_solve_names_the_column_where_a_row_fails(backend: str) -> None:
    gram = spd(20)
    gram[7, 7] = -1
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 7] = False
    out, info = kernels.row_solve_ex(gram, torch.ones(3, 20), mask, backend=backend)
    assert info.tolist() == [8, 0, 8]
    assert not out[[0, 2]].any()
    assert out[1].any()
    with pytest.raises(torch.linalg.LinAlgError, match=r"row 0 .*column 7"):
        kernels.row_solve(gram, torch.ones(3, 20), mask, backend=backend)
    gram[7, 7] = float("nan")
    _, info = kernels.row_solve_ex(gram, torch.ones(3, 20), mask, backend=backend)
    assert info.tolist() == [8, 0, 8]


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "ties": lambda rows, columns: torch.randint(-2, 3, (rows, columns)).float(),
    "equal": torch.ones,
    "zeros of both signs": lambda rows, columns: torch.where(torch.rand(rows, columns) < 0.5, 0.0, -0.0),
    "denormal": lambda rows, columns: torch.randn(rows, columns) * 1e-41,
    "huge": lambda rows, columns: torch.rand(rows, columns) * 3e38,
    "few outliers": lambda rows, columns: torch.randn(rows, columns) ** 21,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@given(shape=st.tuples(st.integers(1, 30), st.integers(1, 70)), share=st.floats(0, 1), data=st.data())
@few
def test_selection_is_exact(backend: str, kind: str, shape: tuple[int, int], share: float, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    rows, columns = shape
    width = data.draw(st.integers(0, columns))
    weights = KINDS[kind](rows, columns + 3)[:, 3:]  # rows lie apart, as in the engine's trailing weights
    norms = torch.rand(columns) if kind == "normal" else torch.randint(0, 3, (columns,)).float()
    scores, count = weights.abs() * norms, round(share * weights.numel())
    mask, taken = kernels.select_smallest(weights, norms, count, width, backend=backend)
    assert mask.equal(ranked_mask(scores, count)[:, :width])
    assert taken.dtype == torch.int64
    assert int(taken) == int(mask.sum())
    per_row = round(share * columns)
    by_row = kernels.select_per_row(weights, norms, per_row, backend=backend)
    assert by_row.equal(torch.stack([ranked_mask(row, per_row) for row in scores]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_takes_its_count_as_a_tensor(backend: str) -> None:
    mask, _ = kernels.select_smallest(torch.rand(3, 8), torch.ones(8), torch.tensor(5), 8, backend=backend)
    assert int(mask.sum()) == 5


@pytest.mark.parametrize("backend", BACKENDS)
@given(groups=st.integers(1, 40), m=st.sampled_from([1, 2, 4, 5, 8, 16, 32, 70]), data=st.data())
@few
def test_n_of_m_takes_the_smallest_of_each_group(backend: str, groups: int, m: int, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
    n = data.draw(st.integers(0, m))
    scores = torch.randint(-3, 4, (3, groups * m)).float() * torch.tensor([1.0, -0.0, 1e-41])[:, None]
    mask = kernels.select_n_of_m(scores, n, m, backend=backend)
    wanted = torch.stack([ranked_mask(group, n) for group in scores.view(-1, m)])
    assert mask.view(-1, m).equal(wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=st.integers(0, 1 << 30))
@few
def test_column_sweep_solves_each_rows_triangle(backend: str, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    factor, weights = upper(width), torch.randn(rows, width)
    mask = torch.rand(rows, width) < torch.rand(rows, 1)
    errors = kernels.column_sweep(factor, weights, mask, backend=backend)
    assert not errors[~mask].any()
    scale = 1 + errors.abs().amax(1, keepdim=True)
    assert bool((((errors.double() @ factor.double() - weights) / scale)[mask].abs() < 1e-3).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 64), (4, 8, 40), (3, 7, 70), (16, 32, 96), (0, 4, 8), (5, 5, 10)])
def test_sweep_of_groups_agrees_with_the_sweep_of_its_own_mask(backend: str, n: int, m: int, width: int) -> None:
    torch.manual_seed(0)
    factor, weights = upper(width), torch.randn(21, width)
    errors, mask = kernels.column_sweep_n_of_m(factor, weights, n, m, backend=backend)
    assert bool((mask.view(21, -1, m).sum(2) == n).all())
    again = kernels.column_sweep(factor, weights, mask, backend="reference")
    torch.testing.assert_close(errors, again, rtol=1e-3, atol=1e-3)
    first = kernels.select_n_of_m(weights[:, :m].abs() / factor.diagonal()[:m], n, m, backend="reference")
    assert mask[:, :m].equal(first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 5), (64, 48), (65, 49), (601, 130)])
def test_hessian_is_the_running_mean(backend: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(tokens, width + 3).to(dtype)[:, 3:]
    exact = inputs.double().T @ inputs.double() / tokens
    hessian = torch.full((width, width), float("nan"))
    kernels.accumulate_hessian(hessian, inputs, 1.0, backend=backend)
    torch.testing.assert_close(hessian.double(), exact, rtol=1e-5, atol=1e-5)
    old = spd(width)
    updated = kernels.accumulate_hessian(old.clone(), inputs, 0.25, backend=backend)
    torch.testing.assert_close(updated.double(), 0.75 * old.double() + 0.25 * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_in_batches_is_the_hessian_of_all(backend: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 40, 30)
    hessian = torch.empty(30, 30)
    for seen, batch in enumerate(inputs, start=1):
        kernels.accumulate_hessian(hessian, batch, 1 / seen, backend=backend)
    whole = kernels.accumulate_hessian(torch.empty(30, 30), inputs, 1.0, backend=backend)
    torch.testing.assert_close(hessian, whole)


BAD: list[tuple[str, type[Exception], Callable[[str], Any]]] = [
    ("gram .* 4 x 4", ValueError, lambda b: kernels.row_solve(spd(3), torch.ones(2, 4), mask(2, 4), backend=b)),
    ("mask must have shape", ValueError, lambda b: kernels.row_solve(spd(4), torch.ones(2, 4), mask(2, 3), backend=b)),
    (
        "mask must have dtype bool",
        TypeError,
        lambda b: kernels.row_solve(spd(4), torch.ones(2, 4), torch.ones(2, 4), backend=b),
    ),
    ("weights must have shape", ValueError, lambda b: kernels.row_solve(spd(4), torch.ones(4), mask(1, 4), backend=b)),
    (
        "weights must have dtype",
        TypeError,
        lambda b: kernels.row_solve(spd(4), torch.ones(2, 4).half(), mask(2, 4), backend=b),
    ),
    ("weights must be a tensor", TypeError, lambda b: kernels.row_solve(spd(4), [[1.0]], mask(2, 4), backend=b)),  # type: ignore[arg-type]
    (
        "different devices",
        ValueError,
        lambda b: kernels.row_solve(spd(4), torch.ones(2, 4, device="meta"), mask(2, 4), backend=b),
    ),
    (
        "out must be contiguous",
        ValueError,
        lambda b: kernels.row_solve(spd(4), torch.ones(2, 4), mask(2, 4), out=torch.empty(4, 2).T, backend=b),
    ),
    (
        "out must be",
        ValueError,
        lambda b: kernels.row_solve(spd(4), torch.ones(2, 4), mask(2, 4), out=torch.empty(2, 3), backend=b),
    ),
    (
        "norms must hold",
        ValueError,
        lambda b: kernels.select_smallest(torch.ones(2, 4), torch.ones(3), 1, 4, backend=b),
    ),
    ("width must be", ValueError, lambda b: kernels.select_smallest(torch.ones(2, 4), torch.ones(4), 1, 5, backend=b)),
    ("count must be", ValueError, lambda b: kernels.select_smallest(torch.ones(2, 4), torch.ones(4), 9, 4, backend=b)),
    ("count must be", ValueError, lambda b: kernels.select_per_row(torch.ones(2, 4), torch.ones(4), -1, backend=b)),
    ("do not divide", ValueError, lambda b: kernels.select_n_of_m(torch.ones(2, 6), 2, 4, backend=b)),
    ("n:m must have", ValueError, lambda b: kernels.select_n_of_m(torch.ones(2, 8), 5, 4, backend=b)),
    (
        "factor must have shape",
        ValueError,
        lambda b: kernels.column_sweep(torch.eye(3), torch.ones(2, 4), mask(2, 4), backend=b),
    ),
    (
        "do not divide",
        ValueError,
        lambda b: kernels.column_sweep_n_of_m(torch.eye(6), torch.ones(2, 6), 2, 4, backend=b),
    ),
    ("must be b x b", ValueError, lambda b: kernels.accumulate_hessian(torch.eye(3), torch.ones(2, 4), 1.0, backend=b)),
    (
        "must be contiguous",
        ValueError,
        lambda b: kernels.accumulate_hessian(torch.ones(4, 8)[:, ::2], torch.ones(2, 4), 1.0, backend=b),
    ),
    ("no tokens", ValueError, lambda b: kernels.accumulate_hessian(torch.eye(4), torch.ones(0, 4), 1.0, backend=b)),
    (
        "weight must be",
        ValueError,
        lambda b: kernels.accumulate_hessian(torch.eye(4), torch.ones(2, 4), 1.5, backend=b),
    ),
    (
        "inputs must have dtype",
        TypeError,
        lambda b: kernels.accumulate_hessian(torch.eye(4), torch.ones(2, 4).int(), 1.0, backend=b),
    ),
    ("hessian must have shape", ValueError, lambda b: kernels.inverse_factor(torch.ones(3, 4), backend=b)),
    (
        "must hold each of the 3 columns once",
        ValueError,
        lambda b: kernels.eliminate(torch.eye(3), 0.0, torch.arange(2), torch.arange(2), backend=b),
    ),
    (
        "removed must be",
        ValueError,
        lambda b: kernels.eliminate(torch.eye(3), 0.0, torch.arange(2), torch.ones(1), backend=b),
    ),
    ("hessian must have shape", ValueError, lambda b: kernels.row_energy(torch.ones(2, 4), torch.eye(3), backend=b)),
    (
        "hessian must have shape",
        ValueError,
        lambda b: kernels.outlier_rows(torch.ones(2, 4), torch.eye(3), 1, backend=b),
    ),
    (
        "count must be from 0 to 2",
        ValueError,
        lambda b: kernels.outlier_rows(torch.ones(2, 4), torch.eye(4), 3, backend=b),
    ),
]


def mask(rows: int, width: int) -> Tensor:
    return torch.ones(rows, width, dtype=torch.bool)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("words", "error", "call"), BAD)
def test_bad_arguments_are_refused_in_words(
    backend: str, words: str, error: type[Exception], call: Callable[[str], Any]
) -> None:
    with pytest.raises(error, match=words):
        call(backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be"):
        kernels.select_n_of_m(torch.ones(2, 4), 2, 4, backend="cuda")


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_native_refuses_what_it_has_no_kernel_for() -> None:
    with pytest.raises(TypeError, match="takes float32"):
        kernels.select_n_of_m(torch.ones(2, 4).double(), 2, 4, backend="native")
    with pytest.raises(ValueError, match="runs on CPU tensors, not on meta"):
        kernels.select_n_of_m(torch.ones(2, 4, device="meta"), 2, 4, backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tensors_give_empty_results(backend: str) -> None:
    none = torch.ones(0, 4)
    assert kernels.row_solve(spd(4), none, none.bool(), backend=backend).shape == (0, 4)
    assert kernels.select_n_of_m(none, 2, 4, backend=backend).shape == (0, 4)
    assert kernels.select_smallest(none, torch.ones(4), 0, 2, backend=backend)[0].shape == (0, 2)
    assert kernels.column_sweep(torch.eye(4), none, none.bool(), backend=backend).shape == (0, 4)
