"""Multimodal models are pruned in their text part, however large the other parts are, and saved and packed whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.thanos.checkpoint.test_update import headers, prune, tensors
from thanos import compact
from thanos.checkpoint import load_model
from thanos.compact.base import SparseLinear

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = {**TEXT, "head_dim": 8}
ROTARY = {**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
# Larger than the text part.
VISION: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TOWER = {"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 32}
T: Any = transformers

MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: T.Gemma3Config(
        text_config=T.Gemma3TextConfig(**HEAD, sliding_window=8), vision_config=T.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92),
    "llava": lambda: T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT), vision_config=T.CLIPVisionConfig(**VISION), image_token_index=90),
    "llava_onevision": lambda: T.LlavaOnevisionConfig(
        text_config=T.Qwen2Config(**TEXT), vision_config=T.SiglipVisionConfig(**VISION), image_token_index=90,
        video_token_index=91),
    "mistral3": lambda: T.Mistral3Config(
        text_config=T.MistralConfig(**HEAD), vision_config=T.PixtralVisionConfig(**VISION), image_token_index=90),
    "paligemma": lambda: T.PaliGemmaConfig(
        text_config=T.GemmaConfig(**HEAD), vision_config=T.SiglipVisionConfig(**VISION, projection_dim=32),
        projection_dim=32, image_token_index=90),
    "qwen2_vl": lambda: T.Qwen2VLConfig(
        text_config=ROTARY, vision_config={"depth": 3, "embed_dim": 64, "num_heads": 2, "hidden_size": 32}),
    "qwen2_5_vl": lambda: T.Qwen2_5_VLConfig(text_config=ROTARY, vision_config=TOWER),
    "qwen3_vl": lambda: T.Qwen3VLConfig(
        text_config={**ROTARY, "head_dim": 8},
        vision_config={**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
    "idefics3": lambda: T.Idefics3Config(
        text_config=T.LlamaConfig(**TEXT), vision_config=VISION, image_token_id=90, scale_factor=2),
    "internvl": lambda: T.InternVLConfig(
        text_config=T.Qwen2Config(**TEXT), image_token_id=90,
        vision_config={**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
    "llama4": lambda: T.Llama4Config(
        text_config={**HEAD, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        vision_config={
            **VISION, "intermediate_size": 256, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32}, image_token_index=90),
    "glm4v": lambda: T.Glm4vConfig(
        text_config=ROTARY, vision_config={**TOWER, "image_size": 16, "patch_size": 8}),
}  # fmt: skip


def made(family: str, tokenizer: Any, folder: Path) -> Path:
    try:
        config = MODELS[family]()
    except AttributeError:
        pytest.skip(f"this version of Transformers has no {family}")
    if family in ("qwen2_vl", "qwen2_5_vl") and not hasattr(config, "vision_start_token_id"):
        pytest.skip(f"this version of Transformers does not run {family} of such a configuration")
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_a_multimodal_model_is_pruned_in_its_text_part_and_saved_whole(
    family: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    source = made(family, tiny_tokenizer, tmp_path / "model")
    (source / "preprocessor_config.json").write_text("{}")
    result = prune(source, tmp_path / "out", "--evaluate", str(tmp_path / "text.jsonl"))
    assert result.exit_code == 0, result.stderr
    assert headers(tmp_path / "out") == headers(source)
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(part in name for name in changed for part in ("vision", "visual", "projector", "head"))
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    others = ("vision", "visual", "router")
    inside = [name for name in after if ".layers." in name and not any(part in name for part in others)]
    held = sum(after[name].numel() for name in inside if after[name].dim() > 1)
    pruned = sum(rows * columns for rows, columns in (layer["shape"] for layer in report["layers"]))
    assert pruned == held
    compact.pack(tmp_path / "out", tmp_path / "compact")
    loaded, whole = compact.load(tmp_path / "compact"), load_model(str(tmp_path / "out"))
    assert any(isinstance(module, SparseLinear) for module in loaded.modules())
    assert type(loaded) is type(whole)
    tokens = torch.arange(3, 19, dtype=torch.int64)[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_needs_an_image_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    text = {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "model_type": "opt"}
    config = T.Blip2Config(
        text_config=text, vision_config=VISION,
        qformer_config={**VISION, "encoder_hidden_size": 64, "num_hidden_layers": 1},
    )  # fmt: skip
    T.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", tmp_path / "out")
    assert result.exit_code == 1
    assert "does not run on text alone: it asks for pixel_values too" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
