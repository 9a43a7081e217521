"""Depth that follows the input: which blocks run for which prompt, with a cache and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import thanos
from thanos.shrink import shrink_model
from thanos.shrink.guided import read_depth_sets
from thanos.shrink.skip import Chain
from thanos.walk.decoder import find_decoder


@pytest.fixture
def guided(tiny_model: Callable[..., Any], token_samples: torch.Tensor, tmp_path: Path) -> Path:
    """A saved tiny model whose low and high tokens are prompts of two kinds."""
    model = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[48:] += 0.3
    low, high = token_samples % 40 + 3, token_samples % 40 + 50
    shrunk = shrink_model(model, torch.cat([low, high]), "depth:2@2")
    assert shrunk.sets is not None
    assert sorted(shrunk.sets.samples) == [6, 6]
    shrunk.model.save_pretrained(tmp_path)
    shrunk.sets.write(tmp_path)
    return tmp_path


def test_a_prompt_runs_through_the_blocks_of_its_kind(guided: Path, token_samples: torch.Tensor) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(guided).eval()
    model, sets = thanos.load(guided), read_depth_sets(guided)
    assert all(0 not in some and len(some) == 2 for some in sets.removed)
    chain = Chain(dense, find_decoder(dense).blocks, token_samples[:1, :4])
    prompts = torch.cat([token_samples[:1] % 40 + 3, token_samples[:1] % 40 + 50])
    kinds = sets.kinds(dense.get_input_embeddings()(prompts).mean(1)).tolist()
    assert len(set(kinds)) == 2
    with torch.no_grad():
        wanted = torch.cat([chain.logits(prompts[i : i + 1], sets.removed[kinds[i]]) for i in range(2)])
        torch.testing.assert_close(model(prompts).logits, wanted)
        torch.testing.assert_close(model(prompts[:1]).logits, wanted[:1])


def test_the_kind_stays_with_the_cache(guided: Path, token_samples: torch.Tensor) -> None:
    model, sets = thanos.load(guided), read_depth_sets(guided)
    prompt = token_samples[:1, :6] % 40 + 3
    kind = int(sets.kinds(model.get_input_embeddings()(prompt).mean(1)))
    dense = transformers.AutoModelForCausalLM.from_pretrained(guided).eval()
    chain = Chain(dense, find_decoder(dense).blocks, prompt)
    with torch.no_grad():
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        for length in range(6, 14):
            logits = chain.logits(tokens[:, :length], sets.removed[kind])
            assert int(logits[0, -1].argmax()) == int(tokens[0, length])
        cached = model(prompt).past_key_values
        other = token_samples[:1, :3] % 40 + 50  # of the other kind by itself
        found = model(other, past_key_values=cached).logits
        wanted = chain.logits(torch.cat([prompt, other], 1), sets.removed[kind])[:, 6:]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_plain_load_is_the_dense_model(
    guided: Path, tiny_model: Callable[..., Any], token_samples: torch.Tensor
) -> None:
    model = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad():
        model.get_input_embeddings().weight[48:] += 0.3
        loaded = transformers.AutoModelForCausalLM.from_pretrained(guided)
        torch.testing.assert_close(loaded(token_samples).logits, model(token_samples).logits)


def test_damage_and_bad_requests_are_refused(
    guided: Path, tiny_model: Callable[..., Any], token_samples: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="needs at least 7 samples"):
        shrink_model(tiny_model("llama"), token_samples, "depth:1@7")
    with pytest.raises(ValueError, match="2 of 4 blocks must stay"):
        shrink_model(tiny_model("gemma3"), token_samples, "depth:3@2")
    file = guided / "depth_sets.json"
    file.write_text(file.read_text().replace('"removed": [[', '"removed": [[99, '))
    with pytest.raises(ValueError, match="belongs to another model"):
        thanos.load(guided)
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        thanos.load(guided)
