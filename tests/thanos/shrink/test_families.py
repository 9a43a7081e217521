"""Every family: the smaller model computes what the masked one of the old shape does, saved and loaded by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES

from thanos.shrink import shrink_model
from thanos.shrink.skip import Chain
from thanos.walk.decoder import find_decoder

_GROUPED = FAMILIES["llama"][1]
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", _GROUPED),
    "olmo": ("Olmo", {**_GROUPED, "clip_qkv": 1.0}),
    "cohere_norms": ("Cohere", {**_GROUPED, "use_qk_norm": True}),
    "llama_biases": ("Llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
}
_NO_CHANNELS = {"bloom", "mamba"}
_HEADS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "cohere", "starcoder2"]
_DERIVED = ["opt", "gpt2", "gptj", "gpt_neox", "falcon"]  # divide their width by the number of heads


def build(tiny_model: Callable[..., Any], family: str) -> Any:
    """A tiny model with random biases and norms, so that cutting the wrong ones shows."""
    if family in _MORE:
        name, options = _MORE[family]
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def check(model: Any, samples: torch.Tensor, pattern: str, folder: Path) -> Any:
    """Shrink ``model``, which keeps its shape and is masked; what is saved must compute the same."""
    before = sum(parameter.numel() for parameter in model.parameters())
    shrunk = shrink_model(model, samples, pattern, multiple=4)
    shrunk.model.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert sum(parameter.numel() for parameter in loaded.parameters()) < before
    with torch.no_grad():
        wanted, found = model(samples).logits, loaded(samples).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return loaded


@pytest.mark.parametrize("family", [name for name in [*FAMILIES, "llama_biases"] if name not in _NO_CHANNELS])
def test_channels(tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path, family: str) -> None:
    model = build(tiny_model, family)
    linear = {name: tuple(module.weight.shape) for name, module in model.named_modules() if hasattr(module, "weight")}
    loaded = check(model, token_samples, "channels:0.25", tmp_path)
    smaller = {name: tuple(module.weight.shape) for name, module in loaded.named_modules() if hasattr(module, "weight")}
    cut = [name for name in linear if linear[name] != smaller[name]]
    assert len(cut) >= 6
    for name in cut:
        assert sum(smaller[name]) < sum(linear[name])


@pytest.mark.parametrize("family", [*_HEADS, *_MORE])
def test_heads(tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path, family: str) -> None:
    loaded = check(build(tiny_model, family), token_samples, "heads:0.5", tmp_path)
    assert loaded.config.num_attention_heads == 2
    assert loaded.config.head_dim == 8


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere_norms", "phi3"])
def test_key_and_value_heads(
    tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path, family: str
) -> None:
    loaded = check(build(tiny_model, family), token_samples, "kv-heads:1", tmp_path)
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (2, 1)


def without_blocks(model: Any, samples: torch.Tensor, removed: list[int]) -> torch.Tensor:
    """The logits of a model whose ``removed`` blocks hand their hidden states on."""
    blocks = find_decoder(model).blocks
    with torch.no_grad():
        return Chain(model, blocks, samples[:1, :4]).logits(samples, removed)


def check_depth(model: Any, samples: torch.Tensor, pattern: str, folder: Path) -> tuple[Any, list[int]]:
    """What is saved must compute what ``model``, which keeps its blocks, computes without those that went."""
    shrunk = shrink_model(model, samples, pattern, multiple=4)
    shrunk.model.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    removed = shrunk.report.options["removed_blocks"]
    assert loaded.config.num_hidden_layers == model.config.num_hidden_layers - len(removed)
    return loaded, removed


@pytest.mark.parametrize("family", [*FAMILIES])
def test_depth(tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path, family: str) -> None:
    model = build(tiny_model, family)
    loaded, removed = check_depth(model, token_samples, "depth:1", tmp_path)
    with torch.no_grad():
        found = loaded(token_samples).logits
    torch.testing.assert_close(found, without_blocks(model, token_samples, removed), rtol=1e-4, atol=1e-5)


def test_lists_of_one_entry_a_block_follow_the_blocks(
    tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path
) -> None:
    model = build(tiny_model, "gemma3")
    types = list(model.config.layer_types)
    loaded, removed = check_depth(model, token_samples, "depth:1", tmp_path)
    assert loaded.config.layer_types == [kind for index, kind in enumerate(types) if index not in removed]
    assert len(set(types)) > 1


@pytest.mark.parametrize("family", [*_HEADS, *_MORE, *_DERIVED])
def test_sums(tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path, family: str) -> None:
    """The model of the old shape, masked, is run without the blocks that went: the smaller one computes the same."""
    model = build(tiny_model, family)
    widths = "channels:0.25" if family in _DERIVED else "channels:0.25+heads:0.5"
    loaded, removed = check_depth(model, token_samples, f"{widths}+depth:1", tmp_path)
    with torch.no_grad():
        found = loaded(token_samples).logits
    torch.testing.assert_close(found, without_blocks(model, token_samples, removed), rtol=1e-4, atol=1e-5)
    assert loaded.config.num_attention_heads == (4 if family in _DERIVED else 2)
    tokens = loaded.generate(token_samples[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert 4 < tokens.shape[1] <= 8


@pytest.mark.parametrize(
    ("family", "pattern", "match"),
    [
        ("bloom", "channels:0.25", "BloomForCausalLM cannot say feed-forwards of 96 channels"),
        ("mamba", "channels:0.25", "channels cannot be removed from MambaForCausalLM"),
        ("gpt2", "heads:0.5", "GPT2LMHeadModel cannot say 2 query heads"),
        ("gpt_neox", "heads:0.5", "GPTNeoXForCausalLM cannot say 2 query heads"),
        ("falcon", "heads:0.5", "FalconForCausalLM cannot say 2 query heads"),
        ("bloom", "heads:0.5", "BloomForCausalLM cannot say 2 query heads"),
        ("olmo2", "heads:0.5", "a norm or a projection runs across them"),
        ("llama", "heads:0.1", "cannot be shared out over 4 query heads in 2 groups"),
        ("llama", "kv-heads:2", "leaves none of 4 heads"),
        ("llama", "depth:3", "leaves none of 3 blocks"),
        ("llama", "depth:0.1", "rounds to no block of 3"),
        ("llama", "channels:0.01", "removes no channel of 48"),
        ("llama", "channels:0.99", "leaves no channel of 48"),
        ("llama", "0.5", "use prune_model"),
    ],
)
def test_refusals_change_nothing(
    tiny_model: Callable[..., Any], token_samples: torch.Tensor, family: str, pattern: str, match: str
) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        shrink_model(model, token_samples, pattern, multiple=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
