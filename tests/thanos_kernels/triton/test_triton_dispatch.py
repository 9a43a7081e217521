"""Which backend runs, what is refused and how, and the operators under FakeTensorMode and torch.compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import thanos_kernels as ops
from thanos_kernels import dispatch, library, selfcheck
from thanos_kernels import triton as backend

OPERATIONS = list(backend.OPERATIONS)


def arguments(operation: str, device: str | torch.device = "cpu") -> list[Any]:
    return next(iter(selfcheck.examples(operation, torch.device(device), small=True)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kernel_passes_its_self_check(operation: str, device: torch.device) -> None:
    assert selfcheck.compare(operation, backend.function(operation), device, small=True) < selfcheck.TOLERANCE


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_self_check_and_the_kernels_ask_for_no_default(
    operation: str, dtype: torch.dtype, device: torch.device
) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            error = selfcheck.compare(operation, backend.function(operation), device, small=True)
        assert error < selfcheck.TOLERANCE
    finally:
        torch.set_default_dtype(before)


def test_a_kernel_that_is_wrong_is_named_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
        return torch.zeros_like(scores, dtype=torch.bool)

    monkeypatch.setattr(backend, "function", lambda operation: wrong)
    selfcheck._failure.cache_clear()
    with pytest.warns(RuntimeWarning, match="select_n_of_m.*reference takes its place"):
        problem = selfcheck.failure("select_n_of_m", torch.device("cpu"))
    assert problem is not None
    selfcheck._failure.cache_clear()


def test_a_kernel_that_does_not_compile_is_named_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(backend, "function", lambda operation: broken)
    selfcheck._failure.cache_clear()
    with pytest.warns(RuntimeWarning, match="row_solve.*RuntimeError: no compiler here;"):
        assert selfcheck.failure("row_solve", torch.device("cpu")) is not None
    selfcheck._failure.cache_clear()


def test_auto_takes_triton_only_on_a_device_and_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(selfcheck, "failure", lambda operation, device: checked.append(operation))
    with FakeTensorMode():
        scores = torch.empty(4, 8, device="cuda")
        assert dispatch.choose("select_n_of_m", "auto", scores, group=4)[0] == "triton"
        assert dispatch.choose("select_n_of_m", "auto", scores.double(), group=4)[0] == "reference"
        assert dispatch.choose("select_n_of_m", "auto", scores, group=64)[0] == "reference"
        assert dispatch.choose("row_energy", "auto", scores)[0] == "library"
        assert dispatch.choose("row_solve", "auto", torch.empty(1, 4096, device="cuda"))[0] == "reference"
    assert dispatch.choose("select_n_of_m", "auto", torch.empty(4, 8), group=4)[0] != "triton"
    assert checked == ["select_n_of_m"]


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, scores = torch.zeros(1, 2080), torch.zeros(2, 64)
    mask = torch.zeros(1, 2080, dtype=torch.bool)
    with pytest.raises(ValueError, match="at most 2048 columns, not 2080: choose a smaller block size"):
        ops.row_solve_ex(torch.eye(2080), wide, mask, backend="triton")
    with pytest.raises(TypeError, match=r"float32, not in torch\.float64; use backend='reference'"):
        ops.select_n_of_m(scores.double(), 2, 4, backend="triton")
    with pytest.raises(ValueError, match="m up to 32, not 64"):
        ops.select_n_of_m(scores, 2, 64, backend="triton")
    with pytest.raises(ValueError, match="must be one of auto, native, triton, reference, not 'cuda'"):
        ops.select_n_of_m(scores, 2, 4, backend="cuda")
    with FakeTensorMode(), pytest.raises(ValueError, match=r"different devices \(cpu, cuda:0\); move them to one"):
        ops.select_per_row(torch.empty(2, 4, device="cuda"), torch.empty(4), 1, backend="triton")
    with pytest.raises(ValueError, match="workspace must be a number of bytes"):
        ops.row_solve_ex(torch.eye(4), torch.zeros(1, 4), mask[:, :4], workspace=-1)

    monkeypatch.setattr(backend, "version", lambda: (2, 1, 0))
    with pytest.raises(RuntimeError, match=r"needs Triton 3\.4 or newer, not 2\.1\.0: upgrade"):
        ops.select_n_of_m(scores, 2, 4, backend="triton")
    monkeypatch.setattr(backend, "version", lambda: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        ops.select_n_of_m(scores, 2, 4, backend="triton")
    assert "triton" not in ops.backends()


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA and ROCm tensors, not on cpu: move the tensors"):
        ops.select_n_of_m(torch.zeros(2, 4), 2, 4, backend="triton")


def test_nothing_slow_is_imported_before_a_kernel_runs() -> None:
    code = (
        "import sys, torch, thanos_kernels as k; k.select_n_of_m(torch.zeros(2, 4), 2, 4);"
        "sys.exit('triton' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_interpreter_asked_for_too_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class JITFunction:
        pass

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.language.sum", JITFunction())
    with pytest.raises(RuntimeError, match="set after Triton was imported"):
        ops.select_n_of_m(torch.zeros(2, 4), 2, 4, backend="triton")


def _count_scores(*given: Any, backend: str) -> torch.Tensor:
    return ops.count_scores(*given[:3], ops.score_digits(torch.float32).index(given[3:]), backend=backend)


def calls(where: str | torch.device) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Each public operation with the arguments of its self-check."""
    return {
        "row_solve": (ops.row_solve_ex, arguments("row_solve", where)),
        "select_smallest": (ops.select_smallest, arguments("select_smallest", where)),
        "count_scores": (_count_scores, arguments("count_scores", where)),
        "select_below": (ops.select_below, arguments("select_below", where)),
        "select_per_row": (ops.select_per_row, arguments("select_per_row", where)),
        "select_n_of_m": (ops.select_n_of_m, arguments("select_n_of_m", where)),
        "column_sweep": (ops.column_sweep, arguments("column_sweep", where)),
        "column_sweep_n_of_m": (ops.column_sweep_n_of_m, arguments("column_sweep_n_of_m", where)),
        "accumulate_hessian": (ops.accumulate_hessian, arguments("accumulate_hessian", where)),
    }


def results(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("name", ["auto", "triton", "reference"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors_have_the_shapes_of_real_ones(operation: str, name: str) -> None:
    run, given = calls("cpu")[operation]
    real = results(run(*given, backend="reference"))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(one) if isinstance(one, torch.Tensor) else one for one in given]
        for have, want in zip(results(run(*fake, backend=name)), real, strict=True):
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("name", ["auto", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_without_a_break(operation: str, name: str, device: torch.device) -> None:
    run, given = calls(device)[operation]
    again = [one.clone() if isinstance(one, torch.Tensor) else one for one in given]
    torch.compiler.reset()
    compiled = torch.compile(lambda *values: run(*values, backend=name), fullgraph=True, backend="aot_eager")
    for have, want in zip(results(compiled(*given)), results(run(*again, backend=name)), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_operators_keep_the_rules_of_torch_library(operation: str) -> None:
    operator = getattr(library, operation)
    given = arguments(operation)
    if operation == "row_solve":
        given += [torch.empty_like(given[1]), torch.empty(len(given[1]), dtype=torch.int32), 0]
    torch.library.opcheck(operator, (*given, "reference"), test_utils=("test_schema", "test_faketensor"))
