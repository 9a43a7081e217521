"""Perplexity: the protocol, checked against what is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thanos.scoring.perplexity import load_tokens, perplexity


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(2))


def test_a_model_without_opinion_is_as_perplexed_as_its_vocabulary(
    tiny_model: Callable[..., Any], stream: torch.Tensor
) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    assert perplexity(model, None, stream, sequence_length=16) == pytest.approx(96, rel=1e-5)


def test_windows_do_not_overlap_and_the_rest_is_dropped(tiny_model: Callable[..., Any], stream: torch.Tensor) -> None:
    model = tiny_model("gpt2")
    losses = []
    with torch.no_grad():
        for window in stream[:144].view(3, 48):
            logits = model(window[None]).logits[0]
            losses.append(nn.functional.cross_entropy(logits[:-1], window[1:]))
    expected = float(torch.stack(losses).mean().exp())
    assert perplexity(model, None, stream, sequence_length=48) == pytest.approx(expected, rel=1e-5)
    first = float(losses[0].exp())
    assert perplexity(model, None, stream, sequence_length=48, windows=1) == pytest.approx(first, rel=1e-5)


def test_length_defaults_to_what_the_model_takes(tiny_model: Callable[..., Any], stream: torch.Tensor) -> None:
    model = tiny_model("llama").train()
    assert perplexity(model, None, stream) == perplexity(model, None, stream, sequence_length=64)
    assert model.training


def test_documents_are_joined_by_blank_lines(tiny_tokenizer: Any, tiny_model: Callable[..., Any]) -> None:
    documents = ["the quick brown fox", "jumps over the lazy dog"] * 8
    tokens = load_tokens(documents, tiny_tokenizer)
    assert tokens.tolist() == tiny_tokenizer("\n\n".join(documents))["input_ids"]
    model = tiny_model("llama")
    assert perplexity(model, tiny_tokenizer, documents, sequence_length=16) == perplexity(
        model, None, tokens, sequence_length=16
    )


def test_lengths_that_do_not_fit_are_refused(tiny_model: Callable[..., Any], stream: torch.Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"holds 10 tokens, less than one sequence of 16"):
        perplexity(model, None, stream[:10], sequence_length=16)
    for length in (65, 1):
        with pytest.raises(ValueError, match="from 2 to the 64 tokens"):
            perplexity(model, None, stream, sequence_length=length)
    with pytest.raises(ValueError, match="windows must be at least 1"):
        perplexity(model, None, stream, sequence_length=16, windows=0)
