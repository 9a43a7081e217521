"""Which decoder blocks a model can do without: greedily, by how far the distribution of its next token moves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thanos.walk.decoder import Decoder
from thanos.walk.divergence import divergence
from thanos.walk.memory import available_memory
from thanos.walk.replay import Call, Capture
from thanos.walk.store import BlockStore, Stores, in_memory

_TOKENS = 2048  # of the samples that judge
_SHARE = 0.25  # of the free memory that goes to hidden states, and to what the dense model makes of the samples

Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Removed:
    """Blocks to remove.

    Attributes:
        blocks: their numbers, in the order of removal.
        divergences: after each removal, the mean Kullback-Leibler divergence from the dense model, in nats.
    """

    blocks: list[int]
    divergences: list[float]


def depth_to_remove(
    model: nn.Module,
    decoder: Decoder,
    samples: Tensor,
    count: int,
    protected: Collection[int] = (),
    *,
    device: torch.device | None = None,
    stores: Stores = in_memory,
    tell: Tell | None = None,
) -> Removed:
    """Choose ``count`` blocks, one at a time, each the one without which the model's output moves least.

    All blocks that remain are scored anew after each removal, in one sweep: each block is taken up once, and what every
    model without one of the blocks before it makes of the samples goes through it. So a score takes a forward from the
    block on, and a model whose blocks lie in files is read once a removal.

    Args:
        model: in evaluation mode.
        decoder: its blocks.
        samples: (N, S), token ids; the last so many as make 2048 tokens judge.
        count: less than the number of blocks that may go.
        protected: numbers of blocks, as ``decoder`` lists them, that must stay.
        device: where blocks are worked on; None is that of the embeddings.
        stores: where blocks are taken from.
        tell: called with the candidates scored and how many there will be.
    """
    sweep = Sweep(model, decoder, samples, device, stores)
    total = sum(len(sweep.numbers) - len(protected) - done for done in range(count))
    found = Removed([], [])
    scored = 0
    while len(found.blocks) < count:
        scores: dict[int, float] = {}
        for index, score in sweep.scores({*found.blocks}, {*protected}):
            scores[index] = score
            scored += 1
            if tell is not None:
                tell(scored, total)
        best = min(scores, key=lambda index: (scores[index], index))
        found.blocks.append(best)
        found.divergences.append(scores[best])
    return found


class Sweep:
    """A model taken through its blocks, each once, for all models that lack one of them.

    Attributes:
        numbers: of the blocks in the order in which they run, as the decoder lists them.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, samples: Tensor, device: torch.device | None, stores: Stores
    ) -> None:
        home = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._device = device or home
        self._home = home
        self._held = samples[-max(1, _TOKENS // samples.shape[1]) :]
        self._capture = Capture(model, decoder, samples, stores(decoder.blocks, home).running)
        self._store: BlockStore = stores(self._capture.decoder.blocks, home)
        place = {id(block): number for number, block in enumerate(decoder.blocks)}
        self.numbers = [place[id(block)] for block in self._capture.decoder.blocks]
        self._wanted: dict[int, Tensor] = {}
        self._dense: list[Tensor] = []

    def scores(self, removed: Collection[int], protected: Collection[int]) -> Iterator[tuple[int, float]]:
        """Each block that may go, and the divergence without it and the ``removed``."""
        if not self._dense:
            for _, part in self._parts():
                ((_, hidden),) = self._without(part, (), self.numbers)
                self._dense += hidden.split(1)
        sums = {number: 0.0 for number in self.numbers if number not in removed and number not in protected}
        for start, part in self._parts():
            for number, hidden in self._without(part, removed, protected):
                if number is None:
                    continue
                for row, states in enumerate(hidden.split(1)):
                    found = self._log_probabilities(start + row, states)
                    sums[number] += divergence(self._dense_output(start + row), found) / len(self._held)
        yield from sums.items()

    def logits(self, tokens: Tensor, removed: Collection[int]) -> Tensor:
        """(batch, S, V), without the ``removed`` blocks."""
        ((_, hidden),) = self._without(tokens, removed, self.numbers)
        logits: Tensor = self._capture.finish(tokens, hidden.to(self._home)).logits
        return logits

    def _without(
        self, tokens: Tensor, removed: Collection[int], protected: Collection[int]
    ) -> Iterator[tuple[int | None, Tensor]]:
        """The last block's hidden states without each block that may go, and, under None, with all but ``removed``."""
        streams: dict[int | None, tuple[Tensor, list[Call]]] = {None: self._start(tokens)}
        for index, number in enumerate(self.numbers):
            if number in removed:
                continue
            block = self._store.load(index, self._device)
            whole = streams[None][0]
            streams = {own: (calls[index](block, hidden), calls) for own, (hidden, calls) in streams.items()}
            if number not in protected:
                calls = self._start(tokens)[1]  # of its own: blocks may leave each other notes in them
                streams[number] = whole, calls
            self._store.store(index)
        yield from ((number, hidden) for number, (hidden, _) in streams.items())

    def _start(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        first, calls = self._capture(tokens)
        return first.to(self._device), calls

    def _parts(self) -> Iterator[tuple[int, Tensor]]:
        """The samples that judge, as many at a time as there is memory for, with the number of the first."""
        each = self._capture(self._held[:1])[0].nbytes * (len(self.numbers) + 2)
        size = max(1, int(_SHARE * available_memory(self._device)) // each)
        for start in range(0, len(self._held), size):
            yield start, self._held[start : start + size]

    def _dense_output(self, row: int) -> Tensor:
        """Of the dense model, for one sample; kept where there is memory."""
        if row in self._wanted:
            return self._wanted[row]
        wanted = self._log_probabilities(row, self._dense[row])
        if wanted.nbytes * len(self._held) <= _SHARE * available_memory(wanted.device):
            self._wanted[row] = wanted
        return wanted

    def _log_probabilities(self, row: int, hidden: Tensor) -> Tensor:
        tokens = self._held[row : row + 1]
        logits: Tensor = self._capture.finish(tokens, hidden.to(self._home)).logits
        return logits[0].log_softmax(-1)
