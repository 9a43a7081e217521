"""Where the walk takes each decoder block from and gives it back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn


class BlockStore(Protocol):
    """Where the walk gets each decoder block from, and where it leaves it."""

    def __len__(self) -> int: ...

    def load(self, index: int, device: torch.device) -> nn.Module:
        """The block, its weights on ``device``."""
        ...

    def store(self, index: int) -> None:
        """The block is done: its weights may leave the device."""
        ...


class MemoryStore:
    """Blocks of a model that lies in memory; each goes to the device while it is worked on."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._homes: dict[int, torch.device] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int, device: torch.device) -> nn.Module:
        block = self._blocks[index]
        self._homes[index] = next(block.parameters()).device
        return block.to(device)

    def store(self, index: int) -> None:
        self._blocks[index].to(self._homes.pop(index))
