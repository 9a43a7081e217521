"""The whole engine on the Triton kernels: equal to the reference, and never waiting for its device but once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.marks import SHARED
from thanos import SemiStructured, Structured, Unstructured, prune_weight

FOLDER = SHARED / "golden"
CASES = json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").exists() else []
METHODS = ["thanos", "sparsegpt", "wanda", "magnitude"]
PATTERNS = {"unstructured": Unstructured(0.5), "n:m": SemiStructured(2, 4), "structured": Structured(0.25)}


def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(3 * columns, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_the_reference(method: str, pattern: str, device: torch.device) -> None:
    weight, hessian = layer(8, 40)
    options: dict[str, Any] = {"method": method, "block_size": 16, "outlier_fraction": 0.1}
    wanted = prune_weight(weight.double(), hessian.double(), PATTERNS[pattern], backend="reference", **options)
    got = prune_weight(weight.to(device), hessian.to(device), PATTERNS[pattern], backend="triton", **options)
    assert torch.equal(got.mask.cpu(), wanted.mask)
    torch.testing.assert_close(got.weight.cpu().double(), wanted.weight, rtol=1e-4, atol=1e-5)
    assert got.loss == pytest.approx(wanted.loss, rel=1e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nan_are_refused(value: float, device: torch.device) -> None:
    weight, hessian = layer(4, 16)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        prune_weight(weight.to(device), hessian.to(device), "0.5", block_size=8, backend="triton")


@pytest.mark.skipif(not CASES, reason="no golden cases beside the project")
@pytest.mark.parametrize("case", CASES, ids=[case["file"].removesuffix(".safetensors") for case in CASES])
def test_golden(case: dict[str, Any], device: torch.device) -> None:
    tensors = load_file(FOLDER / case["file"])
    if case["pattern"] == "n:m":
        pattern: Any = SemiStructured(*case["nm"])
    else:
        pattern = {"unstructured": Unstructured, "structured": Structured}[case["pattern"]](case["sparsity"])
    result = prune_weight(
        tensors["weight"].float().to(device),
        tensors["hessian"].float().to(device),
        pattern,
        method=case["method"],
        block_size=case["block_size"],
        outlier_fraction=case["outlier_fraction"],
        damping=case["damping"],
        backend="triton",
    )
    assert torch.equal(result.mask.cpu(), tensors["expected_mask"].bool())
    torch.testing.assert_close(result.weight.cpu().double(), tensors["expected_weight"], rtol=2e-5, atol=2e-5)
    assert result.loss == pytest.approx(case["loss"], rel=2e-3)


@pytest.mark.parametrize("stages", [{}, {"values": "int8"}], ids=["plain", "int8"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_waits_for_the_device_once(
    method: str, pattern: str, stages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors hold no data: whatever asks for a value, or for a copy elsewhere, fails. The engine asks once."""
    asked = []

    def read(*values: torch.Tensor) -> list[float]:
        asked.append([value.device.type for value in values])
        return [
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            1.0,
            1.0,
        ]  # the last two: weight and Hessian are finite

    monkeypatch.setattr("thanos.engine.layer.read", read)
    monkeypatch.setattr("thanos_kernels.triton.refusal", lambda *_, **__: None)
    weight, hessian = torch.empty(48, 64, device="meta"), torch.empty(64, 64, device="meta")
    options: dict[str, Any] = {"method": method, "block_size": 16, "outlier_fraction": 0.1}
    result = prune_weight(weight, hessian, PATTERNS[pattern], backend="triton", **options, **stages)
    assert result.weight.shape == result.mask.shape == (48, 64)
    assert asked == [["meta"] * 7]


def test_meta_tensors_would_notice() -> None:
    tensor = torch.ones(4, device="meta")
    for ask in (
        lambda: tensor[0].item(),
        lambda: bool(tensor.any()),
        tensor.tolist,
        tensor.cpu,
        lambda: int(tensor.sum()),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()
