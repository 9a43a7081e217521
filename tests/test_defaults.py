"""Nothing depends on PyTorch's default dtype or device: results are the same to the bit, whatever the caller set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import default_cases
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each default: what its process left, group by group, and how it ended."""
    found: dict[str, Any] = {}
    for default in default_cases.DEFAULTS:
        folder = tmp_path_factory.mktemp(default)
        run = subprocess.run(
            [sys.executable, str(Path(default_cases.__file__)), default, str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_PERTURB_": "165"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        groups = {path.stem: torch.load(path) for path in folder.glob("*.pt")}
        last = (run.stdout.splitlines() or [""])[-1]
        found[default] = groups, f"the process ended with {run.returncode} in {last}\n{run.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("group", default_cases.GROUPS)
@pytest.mark.parametrize("default", [name for name in default_cases.DEFAULTS if name != "none"])
def test_no_default_changes_anything(default: str, group: str, results: dict[str, Any]) -> None:
    (usual, ending), (under, death) = results["none"], results[default]
    assert group in usual, ending
    assert group in under, death
    wrong = {case: difference(under[group][case], want) for case, want in usual[group].items()}
    assert not {case: reason for case, reason in wrong.items() if reason}


def difference(under: list[torch.Tensor] | str, usual: list[torch.Tensor] | str) -> str:
    """What the default changed; nothing if the two are the same to the bit."""
    if isinstance(usual, str):
        return f"fails with the usual defaults: {usual}"
    if isinstance(under, str):
        return under
    for number, (have, want) in enumerate(zip(under, usual, strict=True)):
        if (have.dtype, have.device, have.shape) != (want.dtype, want.device, want.shape):
            return f"result {number} is {have.dtype} {tuple(have.shape)} on {have.device}, not {want.dtype}"
        if not torch.equal(have, want):
            return f"result {number} differs"
    return ""
