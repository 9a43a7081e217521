"""The dense model beside the pruned one: corrected targets and the reconstruction of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.marks import fuses
from tests.mixtures import tiny_mixture
from thanos import prune_model
from thanos.walk import reconstruct as training
from thanos.walk.decoder import Layer
from thanos.walk.dense import ROUTED, UNMATCHED, DenseInputs
from thanos.walk.hessians import InputHessian


@settings(max_examples=20, deadline=None)
@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=4), without=st.integers(-1, 3))
def test_the_drift_of_parts_is_that_of_the_whole_and_ends_where_a_part_is_unknown(
    parts: list[int], without: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, dense = (torch.randn(sum(parts), 5, generator=draw, dtype=torch.float64) for _ in range(2))
    found = InputHessian("x")
    for number, (own, other) in enumerate(zip(inputs.split(parts), dense.split(parts), strict=True)):
        found.add(own, "reference", None, None if number == without else other)
    if 0 <= without < len(parts):
        assert found.drift is None
    else:
        torch.testing.assert_close(found.drift, (dense - inputs).T @ inputs / len(inputs))


def test_only_the_inputs_of_the_same_tokens_are_matched() -> None:
    layer, caught = Layer("x", nn.Linear(4, 2)), DenseInputs()
    hidden, dense = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def taken(inputs: Tensor, *calls: Tensor) -> Tensor | None:
        with caught.watching([layer], hidden):
            for one in calls:
                layer.module(one)
        return caught.take(layer, inputs)

    assert taken(hidden, dense) is dense or torch.equal(taken(hidden, dense), dense)  # type: ignore[arg-type]
    assert taken(hidden) is None
    assert taken(hidden, dense, dense) is None
    assert taken(hidden[:1], dense[:1]) is None
    assert taken(hidden, dense[:1]) is None
    with caught.watching([layer], hidden):
        layer.module(dense)
        dense.add_(1)
    assert caught.take(layer, hidden) is None


@pytest.mark.parametrize("passes", [1, 2])
def test_corrected_targets_bring_the_outputs_nearer_to_the_dense_models(
    passes: int, tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    def error(**options: Any) -> float:
        model, dense = tiny_model("llama"), tiny_model("llama")
        report = prune_model(model, token_samples, "0.6", passes=passes, batch_size=3, damping=0.1, **options)
        assert all(layer.own_target is None for layer in report.layers)
        with torch.no_grad():
            return float((model(token_samples).logits - dense(token_samples).logits).square().mean())

    assert error(targets="corrected", correction=1.0) < 0.9 * error()
    assert error(targets="corrected", correction=0.0) == error()


@fuses
def test_experts_keep_their_own_targets_and_the_report_says_why(token_samples: Tensor) -> None:
    report = prune_model(tiny_mixture("mixtral"), token_samples, "0.5", targets="corrected")
    for layer in report.layers:
        assert layer.own_target == (ROUTED if "experts" in layer.name else None)
    assert UNMATCHED != ROUTED


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_lowers_the_loss_held_out_and_keeps_every_zero(
    passes: int, dtype: torch.dtype, tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    def pruned(epochs: int) -> tuple[Any, Any]:
        model = tiny_model("llama").to(dtype)
        return model, prune_model(model, token_samples, "2:4", passes=passes, batch_size=3, reconstruct=epochs)

    model, report = pruned(3)
    assert [block.block for block in report.blocks] == list(range(len(report.blocks)))
    assert all(block.after <= block.before for block in report.blocks)
    assert any(block.after < block.before for block in report.blocks)
    assert report.effective_sparsity >= 0.5
    for layer in report.layers:
        groups = model.get_submodule(layer.name).weight.reshape(-1, 4)
        assert int((groups == 0).sum(1).min()) >= 2
        assert layer.zeros == groups.numel() - int(groups.count_nonzero())
    again, _ = pruned(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_loss_that_is_no_number_leaves_the_start(
    tiny_model: Callable[..., Any], token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "RATES", (1e30,))
    start, model = tiny_model("llama"), tiny_model("llama")
    report = prune_model(model, token_samples, "0.5", reconstruct=1)
    prune_model(start, token_samples, "0.5")
    assert all("no number at a learning rate" in str(block.note) for block in report.blocks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_block_without_a_gradient_is_left_as_it_is(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    start, model = tiny_model("llama"), tiny_model("llama")
    for block in model.model.layers:
        block.mlp.forward = torch.no_grad()(block.mlp.forward)
        block.self_attn.forward = torch.no_grad()(block.self_attn.forward)
    report = prune_model(model, token_samples, "0.5", reconstruct=1)
    prune_model(start, token_samples, "0.5")
    assert all(str(block.note).startswith("it cannot be trained (RuntimeError") for block in report.blocks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    alone = prune_model(tiny_model("llama"), token_samples[:1], "0.5", reconstruct=1)
    assert all(block.note == "there are too few samples to hold one out" for block in alone.blocks)


def test_experts_are_reconstructed_with_their_block(token_samples: Tensor) -> None:
    model = tiny_mixture("mixtral")
    report = prune_model(model, token_samples, "0.5", reconstruct=2, refine="refit", targets="corrected")
    assert all(block.note is None for block in report.blocks)
    assert any("experts" in name for block in report.blocks for name in block.parameters)
    for block in report.blocks:
        assert not any("gate.weight" in name for name in block.parameters)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "1:2", "structured:0.25"]),
    method=st.sampled_from(["thanos", "sparsegpt", "wanda", "magnitude"]),
    refine=st.sampled_from(["none", "refit", "admm"]),
    targets=st.sampled_from(["own", "corrected"]),
    epochs=st.integers(0, 1),
    alpha=st.sampled_from([0.0, 0.1]),
    passes=st.integers(1, 2),
)
def test_stages_compose(
    tiny_model: Callable[..., Any], token_samples: Tensor,
    pattern: str, method: str, refine: str, targets: str, epochs: int, alpha: float, passes: int,
) -> None:  # fmt: skip
    def run(**stages: Any) -> tuple[Any, Any]:
        model = tiny_model("llama")
        chosen = {"method": method, "outlier_fraction": alpha, "passes": passes, **stages}
        return model, prune_model(model, token_samples[:8], pattern, block_size=16, **chosen)

    stages: dict[str, Any] = {"refine": refine, "targets": targets, "reconstruct": epochs}
    model, report = run(**stages)
    again, _ = run(**stages)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _, plain = run(targets=targets)
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert layer.zeros == other.zeros
    before, after = plain.layers[0], report.layers[0]  # of the same input and target
    assert after.loss <= before.loss * (1 + 1e-5) + 1e-12
    assert all(block.after <= block.before for block in report.blocks)
