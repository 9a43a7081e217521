"""How much is removed where: the same total in every choice, decided on the dense model; and the presets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.mixtures import tiny_mixture
from thanos import prune_model
from thanos.options import ALLOCATIONS, QUALITIES, WalkOptions


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_removes_as_much(
    allocation: str, passes: int, tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    def run() -> Any:
        options: dict[str, Any] = {"allocation": allocation, "passes": passes, "batch_size": 2}
        return prune_model(tiny_model("llama"), token_samples, 0.7, **options)

    report = run()
    uniform = prune_model(tiny_model("llama"), token_samples, 0.7)
    zeros = [layer.zeros for layer in report.layers]
    assert sum(zeros) == sum(layer.zeros for layer in uniform.layers)
    assert (len({round(layer.sparsity, 2) for layer in report.layers}) > 1) == (allocation != "uniform")
    assert [layer.zeros for layer in run().layers] == zeros
    assert 0 <= min(layer.sparsity for layer in report.layers) <= max(layer.sparsity for layer in report.layers) <= 0.95


def test_curvature_spares_what_is_hard_to_prune(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    def losses(allocation: str) -> float:
        report = prune_model(tiny_model("llama"), token_samples, 0.7, allocation=allocation)
        return sum(layer.relative_loss for layer in report.layers)

    assert losses("curvature") < losses("uniform")


@pytest.mark.parametrize("allocation", ["lamp", "owl", "curvature"])
def test_experts_are_allocated_too(allocation: str, token_samples: Tensor) -> None:
    report = prune_model(tiny_mixture("mixtral"), token_samples, 0.5, allocation=allocation)
    total = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert sum(layer.zeros for layer in report.layers) == pytest.approx(total / 2, abs=len(report.layers))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pattern": "2:4", "allocation": "owl"}, "needs a pattern that may differ from layer to layer"),
        ({"pattern": "structured:0.3", "allocation": "lamp"}, "and not structured:0.3"),
        ({"pattern": "0.5", "allocation": "owl", "method": "wanda"}, "wanda removes the same share of each row"),
        ({"pattern": "0.5", "allocation": "flat"}, "allocation must be one of uniform"),
        ({"pattern": "0.5", "correction": 1.5}, "correction must be from 0 to 1, not 1.5"),
        ({"pattern": "0.5", "targets": "mine"}, "targets must be one of own, corrected"),
        ({"pattern": "0.5", "reconstruct": -1}, "reconstruct must be at least 0, not -1"),
        ({"pattern": "0.5", "quality": "good"}, "quality must be one of fast, balanced, best"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        WalkOptions.of(options.pop("pattern"), **options)


def test_a_preset_sets_what_is_not_given() -> None:
    best = WalkOptions.of("0.5", quality="best", refine="none")
    assert (best.refine, best.targets, best.quality) == ("none", "corrected", "best")
    for name, sets in QUALITIES.items():
        options = WalkOptions.of("2:4", quality=name)
        assert {key: getattr(options, key) for key in sets} == sets
        again = {key: value for key, value in options.arguments().items() if key != "pattern"}
        assert WalkOptions.of("2:4", **again) == options


def test_the_command_says_what_a_preset_switches_on(model_folder: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from thanos.prune import main

    arguments = [str(model_folder), "--output", str(tmp_path / "out"), "--calibration", "builtin", "--samples", "3"]
    result = CliRunner().invoke(
        main, [*arguments, "--sequence-length", "16", "--quality", "best", "--reconstruct", "1", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.stderr
    assert "quality best: --refine admm, --targets corrected, --reconstruct 1" in result.output
