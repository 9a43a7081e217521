"""How the samples go through a model's blocks: all at once, or in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.peers import ALONE, Peers
from thanos.options import WalkOptions
from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder, Layer
from thanos.walk.memory import available_memory, bytes_per_sample
from thanos.walk.replay import Call, Capture
from thanos.walk.spool import DENSE, Hidden, Layout, SpooledHidden
from thanos.walk.store import BlockStore, Stores, in_memory

_BATCH_TOKENS = 4096  # in a batch of the two-pass walk
_STEP_TOKENS = 1024  # that a block is trained on at once
_MEMORY_SHARE = 0.5  # of what is free goes to activations


@dataclass(frozen=True)
class Plan:
    """What the walk needs.

    Attributes:
        store: the blocks in the order in which they run.
        decoder: the same, with their layers.
        calls: for each batch, how each block is called.
        passes: forwards per block.
        device: where blocks are worked on.
        memory_limit: bytes for activations, and for the Hessians of experts.
        bypassed: the names of layers whose weight is used without calling them.
        batch_size: samples in a batch, but for the last one.
        peers: the processes that walk together, each with its share of the samples.
        together: for each layer by name, those that share its input.
        dense_calls: where the dense model runs too, how each of its blocks is called, for each batch.
        steps: where blocks are reconstructed, the parts that they are trained on.
        vectors: of each block, the full names of the vectors that are trained with it.
    """

    store: BlockStore
    decoder: Decoder
    calls: list[list[Call]]
    passes: int
    device: torch.device
    memory_limit: int
    bypassed: frozenset[str] = frozenset()
    batch_size: int = 1
    peers: Peers = ALONE
    together: Mapping[str, list[Layer]] = field(default_factory=dict)
    dense_calls: list[list[Call]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    vectors: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """A few samples on which a block is trained at once.

    Attributes:
        batch: of the walk, that they belong to.
        part: their place in it.
        calls: how each block is called on them.
    """

    batch: int
    part: slice
    calls: list[Call]


def make_plan(
    model: nn.Module,
    decoder: Decoder,
    samples: Tensor,
    options: WalkOptions,
    clock: Clock,
    spool_folder: Path | None = None,
    stores: Stores = in_memory,
    peers: Peers = ALONE,
) -> tuple[Plan, Hidden]:
    """Run the model up to its blocks, and decide how many samples go through them at a time.

    Args:
        spool_folder: where hidden states that take more than the memory limit are kept; None keeps them in memory.
        stores: makes the store of some blocks, and of the device that the embeddings are on.
        peers: the processes that walk together; each runs its share of ``samples``.

    Returns:
        The plan, and the hidden states (n, S, d) of each batch in front of the first block. Where the dense model runs
        beside the pruned one, its own are :func:`copied` from them.
    """
    home = model.get_input_embeddings().weight.device  # type: ignore[operator]
    capture = Capture(model, decoder, samples, stores(decoder.blocks, home).running)
    store = stores(capture.decoder.blocks, home)
    device = work_device(decoder, options)
    limit = options.memory_limit
    if limit is None:
        limit = int(_MEMORY_SHARE * available_memory(device)) // (peers.local_size if device.type == "cpu" else 1)
    passes, size, longest = options.passes, options.batch_size, -(-len(samples) // peers.size)
    if passes is None:
        each = _bytes_per_sample(capture, store, samples[:1], device)
        if options.beside:
            each *= 2  # the other stream's hidden states, and what its layers are given
        passes = 1 if each * longest <= limit else 2
        size = size or max(1, min(_BATCH_TOKENS // samples.shape[1], limit // each))
    if peers.size > 1 and any(layer.experts is not None for block in decoder.layers for layer in block):
        passes = 2  # a process may see no token of an expert, and the others would wait for it
    size = size or max(1, _BATCH_TOKENS // samples.shape[1])
    if peers.size > 1:  # all do what suits the one with the least memory
        passes, size = max(peers.objects(passes)), min(peers.objects(size))
    samples = peers.share(samples)
    size = longest if passes == 1 else size
    hidden: Hidden = []
    calls = []
    with clock("forward"):
        for batch, part in enumerate(samples.split(size)):
            first, recorded = capture(part)
            if batch == 0 and spool_folder is not None and len(samples) * first[0].nbytes > limit:
                shapes = [(len(one), *first.shape[1:]) for one in samples.split(size)]
                hidden = SpooledHidden(spool_folder, Layout(first.dtype, shapes), device)
            hidden.append(first.to(device).contiguous())
            calls.append(recorded)
        twice = options.beside or options.allocation not in ("uniform", "lamp")
        dense_calls = [capture(part)[1] for part in samples.split(size)] if twice else []
        steps = _steps(capture, samples, size, peers.size) if options.reconstruct else []
    vectors = vectors_of(model, capture.decoder.blocks) if options.reconstruct else []
    plan = Plan(
        store,
        capture.decoder,
        calls,
        passes,
        device,
        limit,
        frozenset(capture.bypassed),
        size,
        peers,
        capture.together,
        dense_calls,
        steps,
        vectors,
    )
    return plan, hidden


def copied(hidden: Hidden) -> Hidden:
    """The hidden states in front of the first block once more, for the stream of the dense model.

    In memory both streams may share them: a batch is replaced, never written into.
    """
    if isinstance(hidden, list):
        return list(hidden)
    copy = SpooledHidden(hidden.folder, hidden.layout, hidden.device, stream=DENSE)
    for batch in hidden:
        copy.append(batch)
    return copy


def _steps(capture: Capture, samples: Tensor, size: int, processes: int) -> list[Step]:
    """The parts of each batch of ``size`` samples, about :data:`_STEP_TOKENS` tokens in one of each process."""
    each = max(1, min(_STEP_TOKENS // samples.shape[1] // processes, len(samples) // 8))
    found = []
    for batch, whole in enumerate(samples.split(size)):
        for start in range(0, len(whole), each):
            part = slice(start, min(start + each, len(whole)))
            found.append(Step(batch, part, capture(whole[part])[1]))
    return found


def work_device(decoder: Decoder, options: WalkOptions) -> torch.device:
    """Where the blocks are worked on."""
    if options.device is not None:
        return torch.device(options.device)
    device = next(decoder.blocks[0].parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


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


def vectors_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[list[str]]:
    """Of each block, the full names of its norm gains, biases and other vectors that nothing else in the model uses."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        [
            names[id(one)][0]
            for one in block.parameters()
            if len(names[id(one)]) == 1 and one.dim() == 1 and len(one) > 1 and one.is_floating_point()
        ]
        for block in blocks
    ]
