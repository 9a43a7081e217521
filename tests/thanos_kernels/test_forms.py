"""An operation gives the same whatever form its tensors come in, and whatever the caller has switched on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import thanos_kernels as kernels
from thanos_kernels import native, triton

ROWS, WIDTH = 19, 44
NATIVE = pytest.mark.skipif(not native.available(), reason="the extension is not built")
BACKENDS = ["reference", pytest.param("native", marks=NATIVE)]
ALL = [*BACKENDS, pytest.param("triton", marks=pytest.mark.skipif(not triton.available(), reason="no Triton"))]


def given() -> dict[str, Tensor]:
    """Arguments by name, as anybody would make them."""
    torch.manual_seed(0)
    inputs = torch.randn(3 * WIDTH, WIDTH)
    gram = inputs.T @ inputs / len(inputs)
    return {
        "weights": torch.randn(ROWS, WIDTH),
        "gram": gram,
        "factor": torch.linalg.cholesky(gram).mT.contiguous(),
        "norms": torch.rand(WIDTH),
        "mask": torch.rand(ROWS, WIDTH) < torch.rand(ROWS, 1),
        "inputs": inputs,
        "kept": torch.arange(30),
        "removed": torch.arange(30, WIDTH),
    }


Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {
    "row_solve": lambda t, b: kernels.row_solve(t["gram"], t["weights"], t["mask"], backend=b),
    "select_smallest": lambda t, b: kernels.select_smallest(t["weights"], t["norms"], 300, 20, backend=b),
    "count_scores": lambda t, b: kernels.count_scores(t["weights"], t["norms"], torch.tensor(0), 0, backend=b),
    "select_below": lambda t, b: kernels.select_below(
        t["weights"], t["norms"], torch.tensor(0x3F000000), torch.tensor(3), 20, backend=b
    ),
    "select_per_row": lambda t, b: kernels.select_per_row(t["weights"], t["norms"], 13, backend=b),
    "select_n_of_m": lambda t, b: kernels.select_n_of_m(t["weights"], 2, 4, backend=b),
    "column_sweep": lambda t, b: kernels.column_sweep(t["factor"], t["weights"], t["mask"], backend=b),
    "column_sweep_n_of_m": lambda t, b: kernels.column_sweep_n_of_m(t["factor"], t["weights"], 2, 4, backend=b),
    "accumulate_hessian": lambda t, b: kernels.accumulate_hessian(
        torch.ones(WIDTH, WIDTH), t["inputs"], 0.5, backend=b
    ),
    "inverse_factor": lambda t, b: kernels.inverse_factor(t["gram"], backend=b)[0],
    "eliminate": lambda t, b: kernels.eliminate(t["gram"], 0.01, t["kept"], t["removed"], backend=b),
    "row_energy": lambda t, b: kernels.row_energy(t["weights"], t["gram"], backend=b),
    "outlier_rows": lambda t, b: kernels.outlier_rows(t["weights"], t["gram"], 4, backend=b),
    "damp": lambda t, b: kernels.damp(t["gram"], 0.01),
}


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() == 2 else tensor


def apart(tensor: Tensor) -> Tensor:
    """Elements apart and not at the start of their memory."""
    held = tensor.new_ones([2 * size + 3 for size in tensor.shape])
    view = held[tuple(slice(3, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def negated(tensor: Tensor) -> Tensor:
    """Its memory holds the opposite signs, and a flag says so."""
    if not tensor.is_floating_point():
        return tensor
    view: Tensor = torch._neg_view(-tensor)  # as parts of a conjugate are
    assert view.is_neg()
    return view


def learnt(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor


def from_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


FORMS = [transposed, apart, negated, learnt, from_inference]


def values(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def same(have: Any, want: Any) -> None:
    for left, right in zip(values(have), values(want), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_form_of_the_arguments(operation: str, form: Callable[[Tensor], Tensor], backend: str) -> None:
    want = OPERATIONS[operation](given(), backend)
    have = OPERATIONS[operation]({name: form(tensor) for name, tensor in given().items()}, backend)
    same(have, want)
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in values(have))


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "none": nullcontext,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_mode_of_the_caller(operation: str, mode: str, backend: str) -> None:
    want = OPERATIONS[operation](given(), backend)
    arguments = given()
    with MODES[mode]():
        have = OPERATIONS[operation](arguments, backend)
    for left, right in zip(values(have), values(want), strict=True):
        assert left.equal(right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [learnt, from_inference])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_any_kind_are_written(form: Callable[[Tensor], Tensor], mode: str, backend: str) -> None:
    t = given()
    want = [
        kernels.row_solve(t["gram"], t["weights"], t["mask"], backend=backend),
        kernels.accumulate_hessian(t["gram"].clone(), t["inputs"], 0.5, backend=backend),
        kernels.inverse_factor(t["gram"], backend=backend)[0],
        kernels.damp(t["gram"], 0.01)[0],
    ]
    out, square, again = (form(torch.full((n, WIDTH), float("nan"))) for n in (ROWS, WIDTH, WIDTH))
    info = torch.full((ROWS,), -1, dtype=torch.int32)
    hessian = form(t["gram"].clone())
    with MODES[mode]():
        kernels.row_solve_ex(t["gram"], t["weights"], t["mask"], out=out, info=form(info), backend=backend)
        kernels.accumulate_hessian(hessian, t["inputs"], 0.5, backend=backend)
        kernels.inverse_factor(t["gram"], out=square, backend=backend)
        kernels.damp(t["gram"], 0.01, out=again)
    for have, expected in zip((out, hessian, square, again), want, strict=True):
        assert have.detach().equal(expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("operation", ["row_solve", "column_sweep"])
def test_a_mask_is_true_wherever_its_byte_is_not_zero(operation: str, backend: str) -> None:
    arguments = given()
    want = OPERATIONS[operation](arguments, backend)
    other = torch.tensor([1, 2, 128, 254, 255], dtype=torch.uint8)[torch.randint(5, (ROWS, WIDTH))]
    mask = (arguments["mask"] * other).view(torch.bool)
    assert OPERATIONS[operation]({**arguments, "mask": mask}, backend).equal(want)
    padded = torch.zeros(ROWS, WIDTH + 5, dtype=torch.uint8)
    padded[:, 5:] = arguments["mask"] * other
    assert OPERATIONS[operation]({**arguments, "mask": padded.view(torch.bool)[:, 5:]}, backend).equal(want)


@pytest.mark.parametrize("backend", ALL)
def test_rows_that_share_their_memory(backend: str) -> None:
    """Expanded: all rows are one."""
    t = given()
    row, mask = t["weights"][3:4].expand(ROWS, -1), t["mask"][:1].expand(ROWS, -1)
    for run in (
        lambda w, m: kernels.row_solve(t["gram"], w, m, backend=backend),
        lambda w, m: kernels.column_sweep(t["factor"], w, m, backend=backend),
        lambda w, m: kernels.select_n_of_m(w, 2, 4, backend=backend),
        lambda w, m: kernels.select_per_row(w, t["norms"][:1].expand(WIDTH), 9, backend=backend),
        lambda w, m: kernels.select_smallest(w, t["norms"], 77, WIDTH, backend=backend)[0],
    ):
        assert run(row, mask).equal(run(row.contiguous(), mask.contiguous()))


@pytest.mark.parametrize("backend", ["auto", *ALL])
def test_nothing_in_nothing_out(backend: str) -> None:
    """Sizes of zero reach no kernel that divides by them."""
    none, no_mask = torch.ones(5, 0), torch.ones(5, 0, dtype=torch.bool)
    square = torch.ones(0, 0)
    assert kernels.row_solve(square, none, no_mask, backend=backend).shape == (5, 0)
    assert kernels.select_smallest(none, torch.ones(0), 0, 0, backend=backend)[0].shape == (5, 0)
    assert kernels.select_per_row(none, torch.ones(0), 0, backend=backend).shape == (5, 0)
    assert kernels.select_n_of_m(none, 2, 4, backend=backend).shape == (5, 0)
    assert kernels.column_sweep(square, none, no_mask, backend=backend).shape == (5, 0)
    assert kernels.column_sweep_n_of_m(square, none, 2, 4, backend=backend)[0].shape == (5, 0)
    assert kernels.accumulate_hessian(square, none, 1.0, backend=backend).shape == (0, 0)
    assert kernels.row_energy(none, square, backend=backend).shape == (5,)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_sparse_or_flat_argument_is_refused_in_words(backend: str) -> None:
    with pytest.raises(TypeError, match=r"scores must be dense, not torch.sparse_coo; pass its .to_dense\(\)"):
        kernels.select_n_of_m(torch.ones(2, 4).to_sparse(), 2, 4, backend=backend)
    with pytest.raises(ValueError, match="hessian must have shape any x any, not scalar"):
        kernels.inverse_factor(torch.ones(()), backend=backend)
