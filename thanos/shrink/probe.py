"""What is asked of a model before it is made smaller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import max_length
from thanos.shrink.structure import PROBE_TOKENS, Sites, find_sites
from thanos.walk.decoder import SHARES, Decoder
from thanos.walk.replay import Capture


def check_samples(model: Any, samples: Tensor) -> None:
    """Raise ValueError unless samples are token ids that the model takes."""
    if samples.dim() != 2 or samples.numel() == 0 or samples.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"samples must be a non-empty (N, S) matrix of token ids, not {samples.dtype} {tuple(samples.shape)}"
        )
    limit = max_length(model.config)
    if limit is not None and samples.shape[1] > limit:
        raise ValueError(f"samples of {samples.shape[1]} tokens are longer than the {limit} that the model takes")
    vocabulary = len(model.get_input_embeddings().weight)
    if int(samples.min()) < 0 or int(samples.max()) >= vocabulary:
        raise ValueError(f"samples hold tokens outside of the model's vocabulary of {vocabulary}")


def check_nothing_shared(model: nn.Module, decoder: Decoder) -> None:
    """Raise ValueError where a block's layer shares its weight: what is cut from one would be missing in the other."""
    for block in decoder.skipped:
        for name, dense in block.items():
            if dense.reason.startswith(SHARES):
                raise ValueError(
                    f"{name} of {type(model).__name__} stays as it is, and so does its shape: {dense.reason}"
                )


def block_prefix(model: nn.Module, blocks: Sequence[nn.Module]) -> str:
    """The name of the list that holds the blocks, such as ``model.layers``."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(blocks[0])].rpartition(".")[0]


def linear_weights(decoder: Decoder) -> int:
    """How many weights the blocks' linear layers hold."""
    return sum(layer.weight.numel() for block in decoder.layers for layer in block)


def block_weights(model: Any) -> int:
    """How many weights a model holds beside its embeddings, its output head and its vectors."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(end.weight) for end in ends if end is not None}
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in outside)


def probe_sites(model: Any, decoder: Decoder, samples: Tensor) -> list[Sites]:
    """The sites of each block, in the order of ``decoder.blocks``; blocks of one kind are differentiated once."""
    capture = Capture(model, decoder, samples)
    hidden, calls = capture(samples[:1, :PROBE_TOKENS])
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    known: dict[Any, Sites] = {}
    found: dict[int, Sites] = {}
    for block, layers, call in zip(capture.decoder.blocks, capture.decoder.layers, calls, strict=True):
        kind = (type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters()))
        if kind not in known:
            own = heads if isinstance(heads, int) else None
            known[kind] = find_sites(block, layers, call, hidden, own)
        found[id(block)] = known[kind]
    absent = Sites(None, None, {"channels": "it does not run", "heads": "it does not run"})
    return [found.get(id(block), absent) for block in decoder.blocks]
