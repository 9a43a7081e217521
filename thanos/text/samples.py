"""Calibration samples: text drawn into token windows by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.text.readers import Text, load_text

_BATCH = 256  # documents tokenised at a time


@dataclass(frozen=True)
class Samples:
    """Calibration samples.

    Attributes:
        tokens: (N, S), int64.
        source, sha256: of the text they were drawn from, see :class:`Text`.
        seed: they were drawn with.
    """

    tokens: Tensor
    source: str
    sha256: str
    seed: int

    def provenance(self) -> dict[str, Any]:
        """What a report says of them."""
        count, length = self.tokens.shape
        return {
            "source": self.source,
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": count,
            "sequence_length": length,
        }


def load_samples(source: str | Path, tokenizer: Any, samples: int = 128, length: int = 2048, seed: int = 0) -> Samples:
    """Draw calibration samples.

    Where enough documents are longer than ``length`` tokens, each sample is a random window of another one, as the
    C4 loader of SparseGPT takes them. Otherwise the documents are joined by blank lines and cut, from a random start,
    into windows that do not overlap, of which a random choice is taken.

    Args:
        source: ``c4``, ``wikitext2``, ``builtin``, or a .txt, .jsonl or .parquet file (field ``text``).
        tokenizer: a Hugging Face tokenizer.
        samples, length: N and S, the number of samples and the tokens in each.
        seed: of a generator of its own; global random state is neither used nor changed.

    Raises:
        ValueError: the source cannot be read, or does not hold ``samples`` x ``length`` tokens.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"samples and sequence length must be at least 1, not {samples} and {length}")
    text = load_text(source, "train")
    generator = torch.Generator().manual_seed(seed)
    tokens = _from_long_documents(text, tokenizer, samples, length, generator)
    if tokens is None:
        tokens = _from_joined_text(text, tokenizer, samples, length, generator)
    return Samples(tokens, text.source, text.sha256, seed)


def _from_long_documents(
    text: Text, tokenizer: Any, samples: int, length: int, generator: torch.Generator
) -> Tensor | None:
    if len(text.documents) < samples:
        return None
    order = torch.randperm(len(text.documents), generator=generator).tolist()
    windows: list[Tensor] = []
    for start in range(0, len(order), _BATCH):
        batch = [text.documents[index] for index in order[start : start + _BATCH]]
        for ids in tokenizer(batch)["input_ids"]:
            if len(ids) > length:
                first = _random_below(len(ids) - length + 1, generator)
                windows.append(torch.tensor(ids[first : first + length], dtype=torch.int64))
            if len(windows) == samples:
                return torch.stack(windows)
    return None


def _from_joined_text(text: Text, tokenizer: Any, samples: int, length: int, generator: torch.Generator) -> Tensor:
    stream = tokenize(text, tokenizer)
    if len(stream) < samples * length:
        raise ValueError(
            f"{text.source} holds {len(stream)} tokens, but {samples} samples of {length} need {samples * length}; "
            "take fewer or shorter samples, or more text"
        )
    windows = len(stream) // length
    first = _random_below(len(stream) - windows * length + 1, generator)
    chosen = torch.randperm(windows, generator=generator)[:samples]
    return stream[first : first + windows * length].view(windows, length)[chosen].clone()


def _random_below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator))


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids (T,), int64, of the documents joined by blank lines."""
    return torch.tensor(tokenizer(text.joined())["input_ids"], dtype=torch.int64)
