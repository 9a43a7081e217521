"""How the samples go through a model's blocks: all at once, or in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder
from thanos.walk.memory import available_memory, bytes_per_sample
from thanos.walk.replay import Call, Capture
from thanos.walk.store import BlockStore, MemoryStore

_BATCH_TOKENS = 4096  # in a batch of the two-pass walk
_MEMORY_SHARE = 0.5  # of what is free goes to activations


@dataclass
class Batch:
    """Samples that go through a block together: their hidden states (n, S, d) and how each block is called."""

    hidden: Tensor
    calls: list[Call]


@dataclass
class Plan:
    """What the walk needs: the blocks in their order, and the batches in front of the first of them."""

    store: BlockStore
    decoder: Decoder
    batches: list[Batch]
    passes: int
    device: torch.device


def make_plan(
    model: nn.Module,
    decoder: Decoder,
    samples: Tensor,
    passes: int | None,
    batch_size: int | None,
    memory_limit: int | None,
    device: str | torch.device | None,
    clock: Clock,
) -> Plan:
    """Run the model up to its blocks, and decide how many samples go through them at a time."""
    capture = Capture(model, decoder, samples)
    store = MemoryStore(capture.decoder.blocks)
    target = torch.device(device) if device is not None else next(decoder.blocks[0].parameters()).device
    limit = memory_limit if memory_limit is not None else int(_MEMORY_SHARE * available_memory(target))
    if passes is None:
        each = _bytes_per_sample(capture, store, samples[:1], target)
        passes = 1 if each * len(samples) <= limit else 2
        batch_size = batch_size or max(1, min(_BATCH_TOKENS // samples.shape[1], limit // each))
    size = len(samples) if passes == 1 else batch_size or max(1, _BATCH_TOKENS // samples.shape[1])
    batches = []
    with clock("forward"):
        for part in samples.split(size):
            hidden, calls = capture(part)
            batches.append(Batch(hidden.to(target), calls))
    return Plan(store, capture.decoder, batches, passes, target)


def _bytes_per_sample(capture: Capture, store: BlockStore, sample: Tensor, device: torch.device) -> int:
    """The most that any block needs; blocks of the same parameters are measured once."""
    hidden, calls = capture(sample)
    needs: dict[Any, int] = {}
    for index, call in enumerate(calls):
        kind = tuple(parameter.shape for parameter in capture.decoder.blocks[index].parameters())
        if kind not in needs:
            needs[kind] = bytes_per_sample(store.load(index, device), call, hidden.to(device))
            store.store(index)
    return max(needs.values())
