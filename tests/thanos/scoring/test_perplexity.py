"""Perplexity: the protocol, checked against what is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thanos.scoring.perplexity import load_tokens, perplexity
from thanos.scoring.windows import load_windows


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


def mean_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Of all tokens of windows but the first."""
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def test_every_window_starts_with_what_the_tokenizer_puts_in_front(
    tiny_model: Callable[..., Any], bos_tokenizer: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_model("gemma")
    text = ["the quick brown fox jumps over the lazy dog " * 20]
    plain = torch.tensor(tiny_tokenizer(text[0])["input_ids"])
    count = len(plain) // 15
    windows = torch.cat((torch.ones(count, 1, dtype=torch.int64), plain[: count * 15].view(count, 15)), dim=1)
    expected = mean_loss(model, windows)  # all 15 tokens of text are predicted
    score = perplexity(model, bos_tokenizer, text, sequence_length=16)
    assert score == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tiny_tokenizer, text, sequence_length=16, bos="yes") == score
    stream = load_tokens(text, bos_tokenizer)
    assert stream.tolist() == [1, *plain.tolist()]
    assert perplexity(model, bos_tokenizer, stream, sequence_length=16) == score
    assert perplexity(model, None, stream, sequence_length=16) == score  # the model's own token is in front
    assert perplexity(model, None, plain, sequence_length=16, bos="yes") == score

    bare = mean_loss(model, plain[: len(plain) // 16 * 16].view(-1, 16))
    for tokenizer, source in ((bos_tokenizer, text), (tiny_tokenizer, text), (None, stream), (None, plain)):
        score = perplexity(model, tokenizer, source, sequence_length=16, bos="no")
        assert score == pytest.approx(bare, rel=1e-5)


def test_windows_say_what_they_are(bos_tokenizer: Any, tiny_tokenizer: Any) -> None:
    text = ["the quick brown fox jumps over the lazy dog " * 20]
    windows = load_windows(text, bos_tokenizer, 16, windows=3)
    assert windows.tokens.shape == (3, 16)
    assert windows.scored == load_windows(text, tiny_tokenizer, 16).scored == 15
    record = windows.record()
    assert (record["sequence_length"], record["windows"], record["bos"]) == (16, 3, True)
    assert load_windows(text, bos_tokenizer, 16, bos="no").record()["bos"] is False
    with pytest.raises(ValueError, match=r"less than one sequence of 1000, of which 999 are text"):
        load_windows(text, bos_tokenizer, 1000)


def test_asking_for_a_token_that_nobody_names_is_refused(tiny_model: Callable[..., Any], stream: torch.Tensor) -> None:
    model = tiny_model("llama", bos_token_id=None)
    with pytest.raises(ValueError, match="names no begin-of-sequence token"):
        perplexity(model, None, stream, sequence_length=16, bos="yes")


def test_perplexity_does_not_depend_on_defaults(tiny_model: Callable[..., Any], bos_tokenizer: Any) -> None:
    model = tiny_model("llama")
    text = ["the quick brown fox jumps over the lazy dog " * 9]
    expected = perplexity(model, bos_tokenizer, text, sequence_length=16)
    with torch.device("meta"):
        assert perplexity(model, bos_tokenizer, text, sequence_length=16) == expected
