"""The engine against brute force in float64, case by case. The cases lie outside the project; without them: skipped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.marks import SHARED
from thanos import Pattern, SemiStructured, Structured, Unstructured, prune_weight

FOLDER = SHARED / "golden"
CASES = json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").exists() else []

pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden cases beside the project ({FOLDER.name} folder missing)")


def pattern_of(case: dict) -> Pattern:
    if case["pattern"] == "n:m":
        return SemiStructured(*case["nm"])
    return {"unstructured": Unstructured, "structured": Structured}[case["pattern"]](case["sparsity"])


@pytest.mark.parametrize("case", CASES, ids=[case["file"].removesuffix(".safetensors") for case in CASES])
@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float64, "reference", 1e-10), (torch.float32, "reference", 2e-5), (torch.float32, "auto", 2e-5)],
    ids=["float64", "float32", "float32-auto"],
)
def test_golden(case: dict, dtype: torch.dtype, backend: str, tolerance: float) -> None:
    tensors = load_file(FOLDER / case["file"])
    result = prune_weight(
        tensors["weight"].to(dtype),
        tensors["hessian"].to(dtype),
        pattern_of(case),
        method=case["method"],
        block_size=case["block_size"],
        outlier_fraction=case["outlier_fraction"],
        damping=case["damping"],
        backend=backend,
    )
    expected = tensors["expected_weight"]
    assert torch.equal(result.mask, tensors["expected_mask"].bool())
    assert int(result.mask.sum()) == case["pruned"]
    torch.testing.assert_close(result.weight.double(), expected, rtol=tolerance, atol=tolerance)
    assert result.loss == pytest.approx(case["loss"], rel=100 * tolerance)
