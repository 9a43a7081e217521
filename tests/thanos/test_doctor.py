"""The doctor's report and its exit code."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from thanos import doctor
from thanos_kernels import native, triton


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real checks of the native kernels, on few rows."""
    if not native.available():
        pytest.skip("the C++ extension is not built")
    check = doctor.check_backend
    monkeypatch.setattr(doctor, "examine", lambda: check("native", torch.device("cpu"), small=True))


@pytest.mark.usefixtures("_small")
def test_reports_a_healthy_machine() -> None:
    done = CliRunner().invoke(doctor.main)
    assert done.exit_code == 0
    assert f"all {len(triton.OPERATIONS)} checks passed" in done.output
    assert all(operation in done.output for operation in triton.OPERATIONS)


@pytest.mark.usefixtures("_small")
def test_names_the_kernel_that_fails_and_exits_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(factor: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sweep(factor, weights, mask) * 1.001

    sweep = native.column_sweep
    monkeypatch.setattr(native, "column_sweep", slightly_off)
    done = CliRunner().invoke(doctor.main)
    assert done.exit_code == 1
    assert f"1 of {len(triton.OPERATIONS)} checks failed: column_sweep (native)" in done.output
    report = json.loads(CliRunner().invoke(doctor.main, ["--json"]).output)
    failed = {one["operation"]: one["problem"] for one in report["checks"] if one["problem"]}
    assert failed == {"column_sweep": "differs from the reference"}


def test_says_what_auto_takes_and_why() -> None:
    taken = {operation: (chosen, why) for device, operation, chosen, why in doctor.choices() if device == "cpu"}
    assert set(triton.OPERATIONS) < set(taken)
    assert taken["row_energy"] == ("library", "products of PyTorch")
    if native.available():
        assert taken["row_solve"] == ("native", "CPU tensors")


@pytest.mark.skipif(not native.available(), reason="the C++ extension is not built")
def test_checks_the_native_kernels() -> None:
    checks = doctor.check_backend("native", torch.device("cpu"), small=True)
    assert [one.operation for one in checks] == list(triton.OPERATIONS)
    assert [one.problem for one in checks] == [""] * len(checks)


def test_a_kernel_that_is_wrong_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
        return torch.ones_like(scores, dtype=torch.bool)

    monkeypatch.setattr(triton, "function", lambda operation: wrong)
    monkeypatch.setattr(triton, "OPERATIONS", ("select_n_of_m",))
    (check,) = doctor.check_backend("triton", torch.device("cpu"), small=True)
    assert check.problem == "differs from the reference"
    assert check.error is None
