"""The doctor's report and its exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from thanos import doctor
from thanos_kernels import native, triton


def a_check(**changes: Any) -> doctor.Check:
    values: dict[str, Any] = {
        "operation": "row_solve",
        "backend": "native",
        "where": "cpu",
        "error": 1e-7,
        "seconds": 0.1,
        "reference_seconds": 0.2,
        "problem": "",
    }
    return doctor.Check(**{**values, **changes})


def test_reports_a_healthy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [a_check()])
    done = CliRunner().invoke(doctor.main)
    assert done.exit_code == 0
    assert "all 1 checks passed" in done.output
    assert "torch" in done.output


def test_names_the_kernel_that_fails_and_exits_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [a_check(), a_check(operation="column_sweep", problem="differs")])
    done = CliRunner().invoke(doctor.main)
    assert done.exit_code == 1
    assert "1 of 2 checks failed: column_sweep (native)" in done.output
    report = json.loads(CliRunner().invoke(doctor.main, ["--json"]).output)
    assert [one["problem"] for one in report["checks"]] == ["", "differs"]


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
