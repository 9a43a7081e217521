"""Which decoder blocks a model can do without: greedily, by how far the distribution of its next token moves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import Tensor

from thanos.shrink.skip import Chain
from thanos.walk.divergence import divergence

_TOKENS = 2048  # of the samples that judge


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
    chain: Chain,
    samples: Tensor,
    count: int,
    protected: Collection[int] = (),
    tell: Callable[[int, int], None] | None = None,
) -> Removed:
    """Choose ``count`` blocks, one at a time, each the one without which the model's output moves least.

    All blocks that remain are scored anew after each removal. A block's score takes a forward from it on: the hidden
    states in front of every block of the model so far are kept.

    Args:
        chain: the model and its blocks.
        samples: (N, S), token ids; the last so many as make 2048 tokens judge.
        count: less than the number of blocks that may go.
        protected: blocks that must stay.
        tell: called with the candidates scored and how many there will be.
    """
    held = samples[-max(1, _TOKENS // samples.shape[1]) :]
    total = sum(len(chain.blocks) - len(protected) - done for done in range(count))
    removed: list[int] = []
    divergences: list[float] = []
    scored = 0
    wanted = [_log_probabilities(chain.logits(sample[None])) for sample in held]
    while len(removed) < count:
        scores = dict.fromkeys(
            (index for index in range(len(chain.blocks)) if index not in {*removed, *protected}), 0.0
        )
        for number, sample in enumerate(held):
            kept = chain.inputs(sample[None], removed)
            for index in scores:
                with chain.from_block(index, kept[index], removed):
                    found = _log_probabilities(chain.logits(sample[None]))
                scores[index] += divergence(wanted[number], found) / len(held)
                if number == len(held) - 1:
                    scored += 1
                    if tell is not None:
                        tell(scored, total)
        best = min(scores, key=lambda index: (scores[index], index))
        removed.append(best)
        divergences.append(scores[best])
    return Removed(removed, divergences)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits[0].log_softmax(-1)
