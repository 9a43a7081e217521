"""Fewer experts: the router forgets those that went, and what is saved loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.marks import fuses
from tests.mixtures import MIXTURES, tiny_mixture
from thanos.shrink import shrink_model
from thanos.shrink.experts import find_mixtures, score_mixtures

pytestmark = fuses

NOT_FOUND = {  # their experts stay, and a sentence says why
    "ernie4_5_moe": "cannot say 2 experts",
    "llama4": "are not given tokens, the experts chosen for each, and their weights",
    "jetmoe": "are not given tokens, the experts chosen for each, and their weights",
    "dbrx": "has no mixture of fused experts",
}
FAMILIES = [family for family in MIXTURES if family not in NOT_FOUND]


def build(family: str, **changes: Any) -> Any:
    """A tiny mixture with random biases and norms, so that cutting the wrong ones shows."""
    try:
        model = tiny_mixture(family, **changes)
    except AttributeError:
        pytest.skip(f"this Transformers has no {family}")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_forgets_the_experts_that_went(
    family: str, token_samples: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    mixtures = find_mixtures(model, token_samples)
    shrunk = shrink_model(model, token_samples, "experts:0.5")
    gone = shrunk.report.options["removed_experts"]
    with torch.no_grad():  # the experts that stay have updated projections
        for one in mixtures:
            stay = [expert for expert in range(one.experts) if expert not in gone[one.name]]
            own = shrunk.model.get_submodule(one.name)
            for name, parameter in model.get_submodule(one.name).named_parameters(recurse=False):
                parameter[stay] = getattr(own, name)
    routers = {
        id(parameter): gone[one.name]
        for one in mixtures
        for parameter in model.get_submodule(one.router).parameters()
        if parameter.dim() == 2
    }
    linear = torch.nn.functional.linear

    def masked(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = linear(inputs, weight, bias)
        rows = routers.get(id(weight._base if weight._base is not None else weight))
        return output if rows is None else output.index_fill(-1, torch.tensor(rows), -1e4)

    for one in mixtures:  # a correction for the load is added behind a sigmoid
        for name, tensor in model.get_submodule(one.name.rpartition(".")[0]).state_dict().items():
            if "bias" in name and tensor.shape == (one.experts,):
                tensor[gone[one.name]] = -1e4
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked)
        wanted = model(token_samples).logits
    shrunk.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_samples).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(len(experts) == 2 for experts in gone.values())
    assert 0 < shrunk.report.effective_sparsity < 0.5


@pytest.mark.parametrize("pattern", ["experts:0.5+heads:0.5+depth:1", "channels:0.25+experts:0.5"])
def test_sums(pattern: str, token_samples: torch.Tensor, tmp_path: Path) -> None:
    model = build("qwen2_moe")
    shrunk = shrink_model(model, token_samples, pattern, multiple=4)
    shrunk.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_experts == 2
    assert len(shrunk.became) == len(pattern.split("+"))
    if "depth" in pattern:
        assert (loaded.config.num_hidden_layers, loaded.config.num_attention_heads) == (1, 2)
    else:
        assert loaded.config.shared_expert_intermediate_size == 32
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_samples).logits, shrunk.model(token_samples).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_that_stay_are_adjusted_where_held_out_samples_agree(family: str) -> None:
    """The errors in the report are those that the mixtures make of their own inputs, and never rise."""
    model = build(family)
    samples = torch.randint(3, 96, (32, 20), generator=torch.Generator().manual_seed(1))
    shrunk = shrink_model(model, samples, "experts:1")
    told = shrunk.report.options["compensated_experts"]
    assert set(told) == set(shrunk.report.options["removed_experts"])
    held = samples[7::8]
    for name, (before, after) in told.items():
        holder = name.rpartition(".")[0]
        kept: list[torch.Tensor] = []
        mixture = shrunk.model.get_submodule(holder)
        handle = mixture.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            shrunk.model(held)
            handle.remove()
            wanted, found = (_first(one(kept[0])) for one in (model.get_submodule(holder), mixture))
        error = float((wanted - found).square().sum() / wanted.square().sum())
        assert error == pytest.approx(after, rel=1e-3)
        assert after <= before
    assert any(after < 0.99 * before for before, after in told.values()), told


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_nothing_is_adjusted_that_no_sample_can_judge(token_samples: torch.Tensor) -> None:
    model = build("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shrunk = shrink_model(model, token_samples[:1], "experts:0.5")
    assert shrunk.report.options["compensated_experts"] == {}
    for name, gone in shrunk.report.options["removed_experts"].items():
        stay = [expert for expert in range(4) if expert not in gone]
        own = shrunk.model.get_submodule(name).down_proj
        assert torch.equal(own, before[f"{name}.down_proj"][stay])


def test_the_score_is_the_mean_weighted_norm(token_samples: torch.Tensor) -> None:
    model = build("mixtral", num_hidden_layers=1, num_local_experts=8)
    (mixture,) = find_mixtures(model, token_samples)
    score_mixtures(model, [mixture], token_samples)
    kept: list[Any] = []
    experts = model.get_submodule(mixture.name)
    handle = experts.register_forward_pre_hook(lambda _, args: kept.append(args))
    with torch.no_grad():
        model(token_samples)
        handle.remove()
        ((tokens, chosen, weights),) = kept
        for expert in range(8):
            gate, up = (tokens @ experts.gate_up_proj[expert].T).chunk(2, -1)
            norms = (torch.nn.functional.silu(gate) * up @ experts.down_proj[expert].T).norm(dim=1)
            own = chosen == expert
            wanted = (norms[:, None] * weights)[own].sum() / own.sum().clamp(min=1)
            assert float(mixture.score("obs")[expert]) == pytest.approx(float(wanted), rel=1e-4)
    assert mixture.tokens.sum() == 2 * token_samples.numel()


def test_fewer_experts_than_a_token_goes_to(token_samples: torch.Tensor) -> None:
    model = build("mixtral", num_local_experts=8, num_experts_per_tok=4)
    assert shrink_model(model, token_samples, "experts:5").model.config.num_experts_per_tok == 3


@pytest.mark.parametrize(
    ("family", "pattern", "match"),
    [
        ("mixtral", "experts:4", "leaves none of 4 experts"),
        ("mixtral", "experts:0.01", "rounds to no expert"),
        *((family, "experts:0.5", match) for family, match in NOT_FOUND.items()),
    ],
)
def test_refusals(family: str, pattern: str, match: str, token_samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=match):
        shrink_model(build(family), token_samples, pattern)


def test_groups_of_experts_lose_equally_many(token_samples: torch.Tensor) -> None:
    changes = {"n_routed_experts": 8, "n_group": 2, "topk_group": 2}
    with pytest.raises(ValueError, match="cannot share out evenly"):
        shrink_model(build("deepseek_v3", **changes), token_samples, "experts:3")
    (gone,) = (
        shrink_model(build("deepseek_v3", **changes), token_samples, "experts:4")
        .report.options["removed_experts"]
        .values()
    )
    assert sum(expert < 4 for expert in gone) == 2


def test_dense_models_have_no_experts(tiny_model: Any, token_samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no mixture"):
        shrink_model(tiny_model("llama"), token_samples, "experts:0.5")
