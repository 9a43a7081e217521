"""Nothing depends on PyTorch's default dtype or device: results are the same to the bit, whatever the caller set."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import default_cases
import pytest
import torch

import thanos

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


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["0.5", "2:4", "structured:0.25"])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda", "magnitude"])
def test_a_layer_that_is_learning_is_pruned_alike(method: str, pattern: str, mode: str) -> None:
    weight, hessian = default_cases.normal(24, 64), default_cases.spd(64)
    options: dict[str, Any] = {"method": method, "outlier_fraction": 0.1, "block_size": 32}
    want = thanos.prune_weight(weight, hessian, pattern, **options)
    with MODES[mode]():
        have = thanos.prune_weight(torch.nn.Parameter(weight), hessian, pattern, **options)
        shared = thanos.prune_weight(weight, thanos.factorise(hessian.clone().requires_grad_()), pattern, **options)
    for result in (have, shared):
        assert result.weight.equal(want.weight)
        assert result.mask.equal(want.mask)
        assert result.loss == want.loss
        assert not result.weight.requires_grad


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_pruned_in_any_mode(mode: str, passes: int) -> None:
    """Its forwards are the caller's, in autocast's dtypes; the pruning between them is not."""
    want, model = default_cases.tiny_llama(), default_cases.tiny_llama()
    thanos.prune_model(want, default_cases.tokens(), "2:4", passes=passes)
    with MODES[mode]():
        thanos.prune_model(model, default_cases.tokens(), "2:4", passes=passes)
    for have, expected in zip(model.parameters(), want.parameters(), strict=True):
        if mode == "autocast":
            assert ((have == 0) == (expected == 0)).float().mean() > 0.95
        else:
            assert have.equal(expected)


FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand"),
    *("randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
ROOMS = ("thanos_kernels", "thanos")


@pytest.mark.parametrize("room", ROOMS)
def test_every_allocation_names_its_dtype_and_device(room: str) -> None:
    unnamed = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {keyword.arg for keyword in node.keywords}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and node.func.attr in FACTORIES and None not in given and not {"dtype", "device"} <= given:
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not unnamed
