"""The corrected target is the ridge regression of the dense outputs on the inputs at hand."""

from __future__ import annotations

import oracle
import pytest
import torch

import thanos_kernels as kernels
from thanos.engine.targets import accumulate_drift, corrected_target, correction_of


def streams(tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    return inputs + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64), inputs


def test_the_whole_correction_is_the_least_squares_fit_of_the_dense_outputs() -> None:
    dense, inputs = streams(200, 12)
    weight, _ = oracle.layer(7, 12, seed=0)
    hessian = inputs.T @ inputs / len(inputs)
    drift = accumulate_drift(torch.full((12, 12), torch.nan, dtype=torch.float64), dense, inputs, 1.0)
    upper, _, _ = kernels.inverse_factor(hessian, 0.0)
    target = corrected_target(weight, correction_of(drift, upper), 1.0)
    torch.testing.assert_close(target, torch.linalg.lstsq(inputs, dense @ weight.T).solution.T)
    half = corrected_target(weight, correction_of(drift, upper), 0.5)
    torch.testing.assert_close(half, (weight + target) / 2)
    assert torch.equal(corrected_target(weight, correction_of(drift, upper), 0.0), weight)


def test_drift_in_batches_is_the_drift_of_all() -> None:
    dense, inputs = streams(60, 8)
    whole = accumulate_drift(torch.empty(8, 8, dtype=torch.float64), dense, inputs, 1.0)
    parts = torch.full((8, 8), torch.nan, dtype=torch.float64)
    for start, stop in [(0, 10), (10, 45), (45, 60)]:
        accumulate_drift(parts, dense[None, start:stop], inputs[None, start:stop], (stop - start) / stop)
    torch.testing.assert_close(parts, whole)
    assert (accumulate_drift(parts, inputs, inputs, 1.0) == 0).all()


def test_drift_by_bfloat16_units_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = (part.bfloat16() for part in streams(5000, 24))
    exact = (dense.double() - inputs.double()).T @ inputs.double() / 5000
    for units, most in ((False, 1e-5), (True, 4e-3)):
        monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda like, units=units: units)
        whole = accumulate_drift(torch.full((24, 24), torch.nan), dense, inputs, 1.0)
        parts = accumulate_drift(torch.full((24, 24), torch.nan), dense[:3000], inputs[:3000], 1.0)
        accumulate_drift(parts, dense[3000:], inputs[3000:], 0.4)
        for found in (whole, parts):
            assert (found - exact).norm() < most * exact.norm()


def test_bad_input_is_refused_with_a_sentence() -> None:
    dense, inputs = streams(60, 8)
    with pytest.raises(ValueError, match="must be of the shape"):
        accumulate_drift(torch.zeros(8, 8, dtype=torch.float64), dense[1:], inputs, 1.0)
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="correction must be from 0"):
            corrected_target(inputs, torch.eye(8, dtype=torch.float64), beta)
