"""Tiny random mixtures of experts of many families and layouts."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from thanos.checkpoint import can_convert

_COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NAMED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SHARED: dict[str, Any] = {**_NAMED, "shared_expert_intermediate_size": 40}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_HEADS = {"head_dim": 8}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", _LOCAL),
    "qwen2_moe": ("Qwen2Moe", _SHARED),
    "qwen3_moe": ("Qwen3Moe", {**_NAMED, **_HEADS}),
    "qwen3_next": (
        "Qwen3Next",
        {
            **_SHARED, **_HEADS, **_LINEAR, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    "deepseek_v2": ("DeepseekV2", {**_ROUTED, **_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_ROUTED, **_LATENT}),
    "gpt_oss": ("GptOss", {**_LOCAL, **_HEADS, **_SLIDING}),
    "glm4_moe": ("Glm4Moe", {**_ROUTED, **_HEADS}),
    "olmoe": ("Olmoe", _NAMED),
    "granitemoe": ("GraniteMoe", _LOCAL),
    "granitemoeshared": ("GraniteMoeShared", {**_LOCAL, "shared_intermediate_size": 40}),
    "phimoe": ("Phimoe", _LOCAL),
    "jamba": (
        "Jamba",
        {
            **_NAMED, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
            "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_expand": 1, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "hunyuan": ("HunYuanMoEV1", {**_HEADS, "num_experts": 4, "moe_topk": 2}),
    "minimax": ("MiniMax", {**_LOCAL, **_HEADS, **_LINEAR, "block_size": 8}),
    "minimax_m2": ("MiniMaxM2", {**_LOCAL, **_HEADS, "rotary_dim": 8}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 1,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **_ROUTED, **_HEADS, "moe_shared_expert_intermediate_size": 24, "mamba_num_heads": 4, "mamba_head_dim": 8,
            "layers_block_type": ["mamba", "moe", "attention", "moe"], "ssm_state_size": 4, "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "dots1": ("Dots1", {**_ROUTED, **_HEADS, "num_key_value_heads": 4}),
    "flex_olmo": ("FlexOlmo", _NAMED),
    "lfm2_moe": ("Lfm2Moe", {**_NAMED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    "exaone_moe": ("ExaoneMoe", {**_NAMED, **_HEADS, "num_shared_experts": 1, "first_k_dense_replace": 1,
                                 "n_group": 1, "topk_group": 1}),
    "solar_open": ("SolarOpen", {**_ROUTED, **_HEADS}),
    "afmoe": ("Afmoe", {**_NAMED, **_HEADS, "num_shared_experts": 1, "num_dense_layers": 1}),
    "llama4": (
        "Llama4Text",
        {
            **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 1, "attention_chunk_size": 32,
        },
    ),
    "jetmoe": ("JetMoe", {**_LOCAL, "kv_channels": 8}),
    "dbrx": ("Dbrx", {}),
}  # fmt: skip

FUSED = ("gpt_oss", "granitemoe", "granitemoeshared", "llama4", "jetmoe", "dbrx")  # so in the checkpoint too


def tiny_mixture(family: str, **changes: Any) -> Any:
    """A random model of two blocks or so in evaluation mode, float32; AttributeError where Transformers lacks it."""
    name, options = MIXTURES[family]
    torch.manual_seed(0)
    if family == "dbrx" and not can_convert():
        raise AttributeError("the DBRX of Transformers 4 is refused")
    if family == "dbrx":
        config = transformers.DbrxConfig(
            d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=96,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        )  # fmt: skip
        config.attn_config.rope_theta = 10000.0
    else:
        config = getattr(transformers, f"{name}Config")(**{**_COMMON, **options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # fused experts are left uninitialised by some families
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
        elif not bool(parameter.isfinite().all()) or float(parameter.detach().abs().max()) > 1e3:
            torch.nn.init.zeros_(parameter)
    return model
