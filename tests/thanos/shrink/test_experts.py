"""Fewer experts: the router forgets those that went, and what is saved loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from thanos.shrink import shrink_model
from thanos.shrink.experts import find_mixtures, score_mixtures

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL = {**_COMMON, "num_experts": 8, "moe_intermediate_size": 16}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {**_COMMON, "num_local_experts": 8},
    "Qwen2Moe": {**_SMALL, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**_SMALL, "head_dim": 8},
    "Olmoe": _SMALL,
    "GptOss": {**_COMMON, "num_local_experts": 8, "head_dim": 8},
    "DeepseekV3": {
        **_COMMON, **_LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**MIXTURES[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_router_forgets_the_experts_that_went(
    kind: str, token_samples: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    mixtures = find_mixtures(model, token_samples)
    shrunk = shrink_model(model, token_samples, "experts:0.5")
    gone = shrunk.report.options["removed_experts"]
    forgotten = {id(model.get_submodule(one.router).weight): gone[one.name] for one in mixtures}
    linear = torch.nn.functional.linear

    def masked(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = linear(inputs, weight, bias)
        rows = forgotten.get(id(weight._base if weight._base is not None else weight))
        return output if rows is None else output.index_fill(-1, torch.tensor(rows), -1e4)

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked)
        wanted = model(token_samples).logits
    shrunk.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_samples).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(len(experts) == 4 for experts in gone.values())
    assert 0 < shrunk.report.effective_sparsity < 0.5


def test_the_score_is_the_mean_weighted_norm(token_samples: torch.Tensor) -> None:
    model = build("Mixtral", num_hidden_layers=1)
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
    model = build("Mixtral", num_experts_per_tok=4)
    assert shrink_model(model, token_samples, "experts:5").model.config.num_experts_per_tok == 3


@pytest.mark.parametrize(
    ("kind", "pattern", "match"),
    [
        ("Mixtral", "experts:8", "leaves none of 8 experts"),
        ("Mixtral", "experts:0.01", "rounds to no expert"),
        ("DeepseekV3", "experts:3", "cannot share out evenly"),
    ],
)
def test_refusals(kind: str, pattern: str, match: str, token_samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=match):
        shrink_model(build(kind), token_samples, pattern)


def test_dense_models_have_no_experts(tiny_model: Any, token_samples: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no mixture"):
        shrink_model(tiny_model("llama"), token_samples, "experts:0.5")
