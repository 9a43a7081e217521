"""Where the walk takes each decoder block from and gives it back to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from thanos.checkpoint import BlockFiles


class BlockStore(Protocol):
    """Where the walk gets each decoder block from, and where it leaves it.

    Attributes:
        resident: whether all blocks are in memory all the time.
    """

    resident: bool

    def __len__(self) -> int: ...

    def load(self, index: int, device: torch.device) -> nn.Module:
        """The block, its weights on ``device``."""
        ...

    def store(self, index: int) -> None:
        """The block is done: its weights may leave the device."""
        ...

    def running(self) -> AbstractContextManager[None]:
        """Within the body, the model as a whole can run, on the device of its embeddings."""
        ...


class MemoryStore:
    """Blocks of a model that lies in memory; each goes to the device while it is worked on."""

    resident = True

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

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()


class DiskStore:
    """Blocks that are read from their files when their turn comes, and dropped after it.

    Args:
        files: of the model that the blocks belong to.
        blocks: in the order in which they are numbered.
        device: of the model's embeddings.
    """

    resident = False

    def __init__(self, files: BlockFiles, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._files, self._blocks, self._device = files, blocks, device

    def __len__(self) -> int:
        return len(self._blocks)

    def load(self, index: int, device: torch.device) -> nn.Module:
        block = self._blocks[index]
        self._files.load(block)
        move_loaded(block, device)
        return block

    def store(self, index: int) -> None:
        self._files.drop(self._blocks[index])

    @contextmanager
    def running(self) -> Iterator[None]:
        def before(index: int) -> Callable[..., None]:
            return lambda *_: void(self.load(index, self._device))

        def after(index: int) -> Callable[..., None]:
            return lambda *_: self.store(index)

        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.callback(block.register_forward_pre_hook(before(index)).remove)
                stack.callback(block.register_forward_hook(after(index)).remove)
            yield


Stores = Callable[[Sequence[nn.Module], torch.device], BlockStore]


def in_memory(blocks: Sequence[nn.Module], _: torch.device) -> BlockStore:
    return MemoryStore(blocks)


def from_files(files: BlockFiles) -> Stores:
    return lambda blocks, device: DiskStore(files, blocks, device)


def move_loaded(module: nn.Module, device: torch.device) -> None:
    """Move what is not on the meta device."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and tensor.device != device:
            tensor.data = tensor.data.to(device)


def void(_: object) -> None:
    """A hook that returns something would change what the block is given."""
