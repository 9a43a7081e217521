"""Calibration samples: text drawn into token windows by a seed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.text.beginning import Beginning, beginning
from thanos.text.readers import Text, load_text

_BATCH = 256  # documents tokenised at a time


@dataclass(frozen=True)
class Samples:
    """Calibration samples.

    Attributes:
        tokens: (N, S), int64.
        source, sha256: of the text they were drawn from, see :class:`Text`.
        seed: they were drawn with.
        bos: whether each of them starts with what the tokenizer puts in front of a text.
    """

    tokens: Tensor
    source: str
    sha256: str
    seed: int
    bos: bool = False

    def provenance(self) -> dict[str, Any]:
        """What a report says of them."""
        count, length = self.tokens.shape
        return {
            "source": self.source,
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": count,
            "sequence_length": length,
            "bos": self.bos,
        }


def load_samples(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    *,
    bos: str = "auto",
    text_field: str | None = None,
) -> Samples:
    """Draw calibration samples.

    Where enough documents are longer than a sample, each sample is a random window of another one, as the C4 loader of
    SparseGPT takes them. Otherwise the documents are joined by blank lines and cut, from a random start, into windows
    that do not overlap, of which a random choice is taken.

    Where models are used to a begin-of-sequence token, each sample is that token and ``length`` - 1 tokens of text.

    Args:
        source: ``c4``, ``wikitext2``, ``builtin``; a .txt, .jsonl, .json, .csv, .tsv or .parquet file, compressed or
            not (.gz, .zst, .bz2, .xz); a directory of such files, or one that ``datasets`` saved; or a list of
            documents. Chats are written by the tokenizer's chat template.
        tokenizer: a Hugging Face tokenizer.
        samples: N, the number of samples.
        length: S, the tokens in each.
        seed: of a generator of its own; global random state is neither used nor changed.
        bos: whether samples start with the begin-of-sequence token, see :func:`thanos.text.beginning.beginning`.
        text_field: of the records of a file or data set; None takes ``text``, or else a chat in ``messages`` or
            ``conversations``.

    Raises:
        ValueError: the source cannot be read, or does not hold ``samples`` x ``length`` tokens; ``bos`` is ``yes`` and
            the tokenizer has no such token.
        TypeError: an argument is of another type.
    """
    samples, length, seed = _whole("samples", samples), _whole("length", length), _whole("seed", seed)
    if samples < 1 or length < 1:
        raise ValueError(f"samples and sequence length must be at least 1, not {samples} and {length}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be a number of 64 bits, not {seed}")
    if not callable(tokenizer) or isinstance(tokenizer, type):
        raise TypeError(f"the tokenizer must be one of Transformers', not {type(tokenizer).__name__}")
    begin = beginning(tokenizer, bos)
    width = length - len(begin.tokens)
    if width < 1:
        raise ValueError(f"samples of {length} tokens have no room for text after what stands in front of it")
    text = load_text(source, "train", text_field=text_field, tokenizer=tokenizer)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    windows = _from_long_documents(text, tokenizer, samples, width, begin, generator)
    if windows is None:
        windows = _from_joined_text(text, tokenizer, samples, width, begin, generator)
    return Samples(with_beginning(windows, begin), text.source, text.sha256, seed, bool(begin.tokens))


def load_packed(
    source: str | Path | Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    bos: str = "auto",
    text_field: str | None = None,
) -> Samples:
    """All of a text, in its order, as samples to train on: documents joined by blank lines, cut without a gap.

    Args:
        source, tokenizer, length, bos, text_field: as for :func:`load_samples`. A shorter rest at the end is dropped.

    Raises:
        ValueError: the source cannot be read, or does not hold one sample.
    """
    begin = beginning(tokenizer, bos)
    width = length - len(begin.tokens)
    if width < 1:
        raise ValueError(f"samples of {length} tokens have no room for text after what stands in front of it")
    text = load_text(source, "train", text_field=text_field, tokenizer=tokenizer)
    stream = text_tokens(text, tokenizer, begin)
    if len(stream) < width:
        raise ValueError(f"{text.source} holds {len(stream)} tokens, less than one window of {length}")
    windows = stream[: len(stream) // width * width].view(-1, width)
    return Samples(with_beginning(windows, begin), text.source, text.sha256, 0, bool(begin.tokens))


def _whole(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}") from None


def _from_long_documents(
    text: Text, tokenizer: Any, samples: int, width: int, begin: Beginning, generator: torch.Generator
) -> Tensor | None:
    """Windows (N, W) of as many documents, or None where too few are longer than W."""
    if len(text.documents) < samples:
        return None
    order = torch.randperm(len(text.documents), generator=generator, dtype=torch.int64, device="cpu").tolist()
    windows: list[Tensor] = []
    for start in range(0, len(order), _BATCH):
        batch = [begin.of_document(text.documents[index]) for index in order[start : start + _BATCH]]
        for encoded in tokenizer(batch)["input_ids"]:
            ids = begin.of_text(encoded)
            if len(ids) > width:
                first = _random_below(len(ids) - width + 1, generator)
                windows.append(_tensor(ids[first : first + width]))
            if len(windows) == samples:
                return torch.stack(windows)
    return None


def _from_joined_text(
    text: Text, tokenizer: Any, samples: int, width: int, begin: Beginning, generator: torch.Generator
) -> Tensor:
    stream = text_tokens(text, tokenizer, begin)
    if len(stream) < samples * width:
        length = f"{width + len(begin.tokens)}" + (f", of which {width} are text," if begin.tokens else "")
        raise ValueError(
            f"{text.source} holds {len(stream)} tokens, but {samples} samples of {length} need {samples * width}; "
            "take fewer or shorter samples, or more text"
        )
    windows = len(stream) // width
    first = _random_below(len(stream) - windows * width + 1, generator)
    chosen = torch.randperm(windows, generator=generator, dtype=torch.int64, device="cpu")[:samples]
    return stream[first : first + windows * width].view(windows, width)[chosen].clone()


def with_beginning(windows: Tensor, begin: Beginning) -> Tensor:
    """Windows of text (N, W), int64, each after what stands in front of it: (N, tokens in front + W)."""
    if not begin.tokens:
        return windows
    front = windows.new_tensor(begin.tokens).expand(len(windows), -1)
    return torch.cat((front, windows), dim=1)


def tokenize(text: Text, tokenizer: Any, bos: str = "auto") -> Tensor:
    """Token ids (T,), int64, of the documents joined by blank lines, after what stands in front of a text, once.

    Raises:
        ValueError: as :func:`thanos.text.beginning.beginning`.
    """
    begin = beginning(tokenizer, bos)
    return with_beginning(text_tokens(text, tokenizer, begin)[None], begin)[0]


def text_tokens(text: Text, tokenizer: Any, begin: Beginning) -> Tensor:
    """Token ids (T,), int64, of the documents joined by blank lines, and of nothing in front of them."""
    joined = "\n\n".join(map(begin.of_document, text.documents))
    return _tensor(begin.of_text(tokenizer(joined)["input_ids"]))


def _random_below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (1,), generator=generator, dtype=torch.int64, device="cpu"))


def _tensor(ids: Sequence[int]) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
