"""What the walk says of itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where the walk is.

    Attributes:
        block, blocks: the block at hand, from 0, of how many.
        layer: the name of the layer at hand.
        done, layers: how many layers are pruned, of how many.
        relative_loss: of the layer at hand; None while it is still being worked on.
        seconds: since the walk began.
    """

    block: int
    blocks: int
    layer: str
    done: int
    layers: int
    relative_loss: float | None
    seconds: float
