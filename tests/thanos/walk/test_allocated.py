"""How much is removed where: the same total in every choice, decided on the dense model; and the presets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from tests.marks import streams
from tests.mixtures import tiny_mixture
from thanos import prune_model
from thanos.allocate import SearchState
from thanos.options import ALLOCATIONS, QUALITIES, WalkOptions
from thanos.prune import main
from thanos.walk.divergence import divergence
from thanos.walk.resume import Keeper


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


@pytest.mark.parametrize("allocation", ["lamp", "owl", "curvature", "search"])
def test_experts_are_allocated_too(allocation: str, token_samples: Tensor) -> None:
    report = prune_model(tiny_mixture("mixtral"), token_samples, 0.5, allocation=allocation)
    total = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert sum(layer.zeros for layer in report.layers) == pytest.approx(total / 2, abs=len(report.layers))


def test_a_search_ends_nearer_to_the_dense_model_the_more_it_may_judge(
    tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    dense = tiny_model("llama")

    def distance(evaluations: int) -> float:
        model = tiny_model("llama")
        prune_model(model, token_samples, 0.7, allocation="search", search_evaluations=evaluations)
        with torch.no_grad():
            wanted, found = (one(token_samples).logits.log_softmax(-1).flatten(0, 1) for one in (dense, model))
        return divergence(wanted, found)

    assert distance(24) < distance(1)


def test_a_model_without_a_gradient_is_searched_by_exchanges(
    tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, given, output: output.detach())
    with pytest.warns(RuntimeWarning, match=r"the model has no gradient \(RuntimeError: .*searched by exchanges alone"):
        report = prune_model(model, token_samples, 0.7, allocation="search", search_evaluations=9)
    assert len({round(layer.sparsity, 2) for layer in report.layers}) > 1
    assert all(one.requires_grad for one in model.parameters())


def test_an_interrupted_search_leaves_the_model_dense(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(progress: Any) -> None:
        if progress.layer == "allocation 3 of 24":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_model(model, token_samples, 0.7, allocation="search", progress=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_search_goes_on_where_it_was(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *options: str) -> Any:
        arguments = [str(model_folder), "--output", str(tmp_path / name), "--calibration", "builtin", "--samples", "3"]
        arguments += ["--sequence-length", "16", "--allocation", "search", "--search-evaluations", "9"]
        return CliRunner().invoke(main, [*arguments, "--device", "cpu", *options])

    keep, kept = Keeper.keep_search, []

    def stop(keeper: Keeper, state: SearchState) -> None:
        keep(keeper, state)
        kept.append(state.evaluations)
        if len(kept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "keep_search", stop)
    stopped = run("one")
    assert "the search so far is kept in" in stopped.output
    resumed = run("one", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert kept == [*range(1, 10)]
    assert run("other").exit_code == 0
    files = [tmp_path / name / "model.safetensors" for name in ("one", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_auto_searches_where_it_can(
    tiny_model: Callable[..., Any], token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(pattern: Any, allocation: str, method: str = "thanos") -> tuple[str, list[int]]:
        options: dict[str, Any] = {"allocation": allocation, "method": method, "search_evaluations": 4}
        report = prune_model(tiny_model("llama"), token_samples, pattern, **options)
        return report.options["allocation"], [layer.zeros for layer in report.layers]

    assert run(0.7, "auto") == run(0.7, "search")
    assert run("2:4", "auto") == run("2:4", "uniform")
    assert run(0.7, "auto", "wanda") == run(0.7, "uniform", "wanda")
    monkeypatch.setattr("thanos.walk.search.available_memory", lambda _: 1000)
    assert run(0.7, "auto") == run(0.7, "uniform")


def test_a_search_that_has_no_room_is_refused(
    tiny_model: Callable[..., Any], token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos.walk.search.available_memory", lambda _: 1000)
    with pytest.raises(ValueError, match=r"Hessians of all layers and 4 copies of their weights, .* are free"):
        prune_model(tiny_model("llama"), token_samples, 0.7, allocation="search")


@streams
def test_a_streamed_model_is_not_searched(model_folder: Path, tmp_path: Path) -> None:
    arguments = [str(model_folder), "--output", str(tmp_path / "out"), "--calibration", "builtin", "--samples", "3"]
    result = CliRunner().invoke(
        main, [*arguments, "--sequence-length", "16", "--allocation", "search", "--stream", "yes", "--device", "cpu"]
    )
    assert result.exit_code == 1
    assert "needs the model in memory; choose another, or --stream no" in result.stderr


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pattern": "2:4", "allocation": "owl"}, "needs a pattern that may differ from layer to layer"),
        ({"pattern": "structured:0.3", "allocation": "lamp"}, "and not structured:0.3"),
        ({"pattern": "0.5", "allocation": "owl", "method": "wanda"}, "wanda removes the same share of each row"),
        ({"pattern": "0.5", "allocation": "flat"}, "allocation must be one of uniform"),
        ({"pattern": "0.5", "allocation": "search", "search_evaluations": 0}, "search evaluations must be at least 1"),
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
    arguments = [str(model_folder), "--output", str(tmp_path / "out"), "--calibration", "builtin", "--samples", "3"]
    result = CliRunner().invoke(
        main, [*arguments, "--sequence-length", "16", "--quality", "best", "--reconstruct", "1", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.stderr
    assert "quality best: --refine admm, --targets corrected, --reconstruct 1" in result.output
