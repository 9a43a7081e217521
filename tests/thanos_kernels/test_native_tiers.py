"""Every instruction set that this machine can run agrees with the reference, on shapes that reach every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thanos_kernels import native, reference

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the extension is not built"),
    pytest.mark.usefixtures("tier"),
]


def spd(size: int) -> Tensor:
    inputs = torch.randn(2 * size + 8, size)
    return inputs.T @ inputs / len(inputs)


def holes(rows: int, width: int) -> Tensor:
    """A mask of every density, with an empty row and a full one."""
    mask = torch.rand(rows, width) < torch.linspace(0, 1, rows)[:, None]
    mask[0], mask[-1] = False, True
    return mask


@pytest.mark.parametrize(("rows", "width"), [(2, 1), (17, 5), (33, 64), (20, 131), (6, 300)])
def test_row_solve(rows: int, width: int) -> None:
    torch.manual_seed(0)
    gram, weights, mask = spd(width), torch.randn(rows, width + 2)[:, 1:-1], holes(rows, width)
    out = torch.full((rows, width), float("nan"))
    info = torch.full((rows,), 9, dtype=torch.int32)
    exact, exact_info = torch.empty(rows, width, dtype=torch.float64), torch.empty_like(info)
    native.row_solve(gram, weights, mask, out, info)
    reference.row_solve(gram.double(), weights.double(), mask, exact, exact_info)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    gram[width // 2, width // 2] = -1
    native.row_solve(gram, weights, mask, out, info)
    reference.row_solve(gram.double(), weights.double(), mask, exact, exact_info)
    assert info.equal(exact_info)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)


def test_row_solve_gives_a_row_the_same_result_in_any_company() -> None:
    torch.manual_seed(0)
    gram, weights, mask = spd(48), torch.randn(37, 48), holes(37, 48)

    def solve(rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), 48)
        native.row_solve(gram, weights[rows], mask[rows], out, torch.empty(len(rows), dtype=torch.int32))
        return out

    whole, order = solve(torch.arange(37)), torch.randperm(37)
    torch.testing.assert_close(solve(order), whole[order])
    torch.testing.assert_close(torch.cat([solve(torch.tensor([row])) for row in range(37)]), whole)


SCORES: dict[str, Callable[[int, int], Tensor]] = {
    "normal": torch.randn,
    "equal": torch.ones,
    "few values": lambda rows, columns: torch.randint(-3, 4, (rows, columns)).float(),
    "denormal": lambda rows, columns: torch.randn(rows, columns) * 1e-40,
    "one row far above": lambda rows, columns: (
        torch.randn(rows, columns) * (1 + 1e30 * (torch.arange(rows) == 3))[:, None]
    ),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.99999, 1.0])
def test_select_smallest_of_a_large_matrix(kind: str, share: float) -> None:
    torch.manual_seed(0)
    weights = SCORES[kind](310, 517)[:, 10:]  # beyond the size from which a sample sets the range
    norms = torch.ones(507) if kind == "equal" else torch.rand(507)
    count = round(share * weights.numel())
    for width in (1, 128, 507):
        mask, taken = native.select_smallest(weights, norms, count, width)
        wanted, wanted_taken = reference.select_smallest(weights, norms, count, width)
        assert mask.equal(wanted)
        assert taken == wanted_taken


@pytest.mark.parametrize("misleading", ["first", "last"])
def test_select_smallest_where_a_sample_sees_too_little(misleading: str) -> None:
    weights = torch.ones(300, 1000)
    weights.view(-1)[0 if misleading == "first" else -1] = 0.5
    for count in (1, 2, 299_999, 300_000):
        mask, _ = native.select_smallest(weights, torch.ones(1000), count, 1000)
        assert mask.equal(reference.select_smallest(weights, torch.ones(1000), count, 1000)[0])


@pytest.mark.parametrize("kind", SCORES)
def test_select_per_row_and_n_of_m(kind: str) -> None:
    torch.manual_seed(0)
    weights, norms = SCORES[kind](40, 243)[:, 3:], torch.rand(240)
    for count in (0, 1, 120, 239, 240):
        assert native.select_per_row(weights, norms, count).equal(reference.select_per_row(weights, norms, count))
    for n, m in [(2, 4), (4, 8), (0, 5), (24, 48), (60, 120), (1, 1)]:
        assert native.select_n_of_m(weights, n, m).equal(reference.select_n_of_m(weights, n, m))


def test_n_of_m_puts_nan_last_and_takes_zeros_of_either_sign_as_equal() -> None:
    scores = torch.tensor([[float("nan"), 0.0, -0.0, 1.0], [0.0, -0.0, float("nan"), float("inf")]])
    assert native.select_n_of_m(scores, 1, 4).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert native.select_n_of_m(scores, 3, 4).equal(reference.select_n_of_m(scores, 3, 4))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (33, 30), (50, 128), (70, 131)])
def test_column_sweep(rows: int, width: int) -> None:
    torch.manual_seed(0)
    factor = torch.linalg.cholesky(spd(width)).mT.contiguous()
    weights, mask = torch.randn(rows, width + 1)[:, 1:], holes(rows, width)
    exact = reference.column_sweep(factor.double(), weights.double(), mask)
    torch.testing.assert_close(
        native.column_sweep(factor, weights, mask).double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max())
    )


@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 64), (4, 8, 136), (3, 7, 70), (16, 32, 96), (40, 40, 80)])
def test_column_sweep_n_of_m(n: int, m: int, width: int) -> None:
    torch.manual_seed(0)
    factor = torch.linalg.cholesky(spd(width)).mT.contiguous()
    weights = torch.randn(37, width)
    errors, mask = native.column_sweep_n_of_m(factor, weights, n, m)
    exact, exact_mask = reference.column_sweep_n_of_m(factor.double(), weights.double(), n, m)
    same = (mask == exact_mask).all(1)  # a near tie may fall the other way in float32
    assert int(same.sum()) >= 36
    torch.testing.assert_close(errors[same].double(), exact[same], rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (33, 64), (700, 49), (1025, 97), (5, 700)])
def test_accumulate_hessian(dtype: torch.dtype, tokens: int, width: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(tokens, width + 1).to(dtype)[:, 1:]
    exact = inputs.double().T @ inputs.double() / tokens
    for old, weight in [(torch.full((width, width), float("nan")), 1.0), (spd(width), 0.4), (spd(width), 0.0)]:
        hessian = old.clone()
        native.accumulate_hessian(hessian, inputs, weight)
        wanted = weight * exact + (0 if weight == 1 else (1 - weight) * old.double())
        torch.testing.assert_close(hessian.double(), wanted, rtol=1e-5, atol=1e-5)
        assert hessian.equal(hessian.T)


def test_float16_inputs_keep_denormals_and_infinities() -> None:
    values = torch.tensor([[6e-8, -6e-5, 6.1e-5, 65504.0]]).half()
    hessian = torch.empty(4, 4)
    native.accumulate_hessian(hessian, values, 1.0)
    assert hessian.equal(values.float().T @ values.float())
    native.accumulate_hessian(hessian[:1, :1], torch.tensor([[float("-inf")]]).half(), 1.0)
    assert hessian[0, 0] == float("inf")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    weights, norms, inputs = torch.randn(300, 600), torch.rand(600), torch.randn(300, 200)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        hessian = torch.empty(200, 200)
        native.accumulate_hessian(hessian, inputs, 1.0)
        out, info = torch.empty(300, 200), torch.empty(300, dtype=torch.int32)
        mask, _ = native.select_smallest(weights, norms, 90_000, 200)
        native.row_solve(hessian + torch.eye(200), weights[:, :200], mask, out, info)
        results.append((hessian, mask, out))
    torch.set_num_threads(before)
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
