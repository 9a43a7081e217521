"""What stands in front of every window: asked of the tokenizer, never doubled, never in the middle of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from thanos.text import beginning, load_samples, load_text, tokenize

BOS = 1
WORDS = "the quick brown fox jumps over the lazy dog "


def write(folder: Path, documents: list[str]) -> Path:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rebuilt(tokenizer: Any, single: str, **special: int) -> Any:
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing(single, None, [(f"<{name}>", n) for name, n in special.items()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def test_the_tokenizer_is_asked_by_tokenising(tiny_tokenizer: Any, bos_tokenizer: Any) -> None:
    assert tiny_tokenizer.bos_token_id == BOS  # it has one and does not use it
    assert beginning(tiny_tokenizer).tokens == ()
    assert beginning(tiny_tokenizer, "yes").tokens == (BOS,)
    assert beginning(bos_tokenizer).tokens == beginning(bos_tokenizer, "yes").tokens == (BOS,)
    assert beginning(bos_tokenizer, "no").tokens == ()


def test_two_tokens_in_front_and_one_behind_are_told_apart(tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert beginning(rebuilt(tiny_tokenizer, "$A <s>", s=1)).tokens == ()
    both = rebuilt(tiny_tokenizer, "<unk> <s> $A <s>", unk=0, s=1)
    assert beginning(both).tokens == (0, 1)
    tokens = load_samples(write(tmp_path, [WORDS * 20]), both, 4, 10).tokens
    assert tokens[:, :2].tolist() == [[0, 1]] * 4
    assert not bool((tokens[:, 2:] == 0).any())


def test_a_tokenizer_without_one_is_refused_where_one_is_asked_for(tiny_tokenizer: Any, tmp_path: Path) -> None:
    none = rebuilt(tiny_tokenizer, "$A")
    with pytest.raises(ValueError, match="bos cannot be yes: the tokenizer has no begin-of-sequence token"):
        load_samples(write(tmp_path, [WORDS * 20]), none, 4, 10, bos="yes")
    with pytest.raises(ValueError, match="bos must be one of auto, yes, no, not 'maybe'"):
        load_samples(write(tmp_path, [WORDS * 20]), none, 4, 10, bos="maybe")


@pytest.mark.parametrize("documents", [[WORDS * 30], [WORDS * 5] * 8], ids=["joined", "long documents"])
def test_every_sample_starts_with_it_once(bos_tokenizer: Any, tmp_path: Path, documents: list[str]) -> None:
    path = write(tmp_path, documents)
    drawn = load_samples(path, bos_tokenizer, 8, 12)
    assert drawn.tokens.shape == (8, 12)
    assert drawn.tokens.dtype == torch.int64
    assert bool((drawn.tokens[:, 0] == BOS).all())
    assert not bool((drawn.tokens[:, 1:] == BOS).any())
    assert drawn.provenance()["bos"] is True
    without = load_samples(path, bos_tokenizer, 8, 11, bos="no")
    assert torch.equal(without.tokens, drawn.tokens[:, 1:])
    assert without.provenance()["bos"] is False


def test_models_without_one_get_the_samples_they_got(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [WORDS * 30])
    stream = torch.tensor(tiny_tokenizer(WORDS * 30)["input_ids"])
    generator = torch.Generator().manual_seed(3)
    count = len(stream) // 12
    first = int(torch.randint(len(stream) - count * 12 + 1, (1,), generator=generator))
    expected = stream[first : first + count * 12].view(count, 12)[torch.randperm(count, generator=generator)[:8]]
    drawn = load_samples(path, tiny_tokenizer, 8, 12, seed=3)
    assert torch.equal(drawn.tokens, expected)
    assert torch.equal(load_samples(path, tiny_tokenizer, 8, 12, seed=3, bos="no").tokens, expected)
    assert drawn.provenance()["bos"] is False


def test_documents_that_bring_their_own_are_joined_without(bos_tokenizer: Any, tmp_path: Path) -> None:
    text = load_text(write(tmp_path, ["<s>the fox", "<s><s>the dog", "jumps"]), "train")
    stream = tokenize(text, bos_tokenizer).tolist()
    assert stream == [BOS, *ids(bos_tokenizer, "the fox\n\nthe dog\n\njumps")]
    assert tokenize(text, bos_tokenizer, "no").tolist() == stream[1:]


def test_too_little_text_counts_text_alone(bos_tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, [WORDS])
    count = len(ids(bos_tokenizer, WORDS))
    with pytest.raises(ValueError, match=rf"holds {count} tokens, but 9 samples of 10, of which 9 are text, need 81"):
        load_samples(path, bos_tokenizer, 9, 10)
    with pytest.raises(ValueError, match="samples of 1 tokens have no room for text"):
        load_samples(path, bos_tokenizer, 1, 1)
