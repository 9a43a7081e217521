"""Perplexity of a model whose blocks are read from its files, each once for many windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import BlockFiles
from thanos.engine.peers import ALONE, Peers
from thanos.scoring.perplexity import batches, loss, of_all
from thanos.scoring.windows import Windows
from thanos.walk.decoder import find_decoder
from thanos.walk.memory import available_memory, freed_memory_returned
from thanos.walk.replay import Capture
from thanos.walk.store import BlockStore, DiskStore, move_loaded

_SHARE = 0.25  # of the free memory that goes to hidden states


def score_streamed(
    model: Any,
    files: BlockFiles,
    windows: Windows,
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
    peers: Peers = ALONE,
) -> float:
    """What :func:`thanos.scoring.perplexity.score_windows` gives, in the same batches.

    Args:
        model, files: of :func:`thanos.walk.stream.load_streamed`.
        device: where to work.
        progress: called with the windows done and their number.
        peers: processes that share out the windows.

    Raises:
        ValueError: the blocks are no simple chain.
    """
    move_loaded(model, device)
    decoder = find_decoder(model)
    count = len(peers.share(windows.tokens))
    total, done = 0.0, 0
    with torch.no_grad(), freed_memory_returned():
        capture = Capture(model, decoder, windows.tokens, DiskStore(files, decoder.blocks, device).running)
        store = DiskStore(files, capture.decoder.blocks, device)
        parts = batches(windows, peers)
        while parts:
            first, _ = capture(parts[0])
            fits = max(1, int(_SHARE * available_memory(torch.device("cpu")) // first.nbytes))
            group, parts = parts[:fits], parts[fits:]
            for batch, hidden in zip(group, _through(capture, store, group, device), strict=True):
                for logits, window in zip(capture.finish(batch, hidden).logits, batch, strict=True):
                    total += loss(logits, window, windows.scored)
                done += len(batch)
                if progress is not None:
                    progress(done, count)
    return of_all(total, windows, peers)


def _through(capture: Capture, store: BlockStore, group: list[Tensor], device: torch.device) -> list[Tensor]:
    """The last block's hidden states for each batch."""
    captured = [capture(batch) for batch in group]
    hidden, calls = [first for first, _ in captured], [call for _, call in captured]
    for index in range(len(store)):
        block: nn.Module = store.load(index, device)
        hidden = [call[index](block, states) for call, states in zip(calls, hidden, strict=True)]
        store.store(index)
    return hidden
