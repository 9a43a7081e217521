"""Hidden states in files: those that a run goes on from, and those that do not fit into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint import room_for


@dataclass(frozen=True)
class Layout:
    """How batches lie in a file, one behind the other: their dtype and shapes."""

    dtype: torch.dtype
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, hidden: Sequence[Tensor]) -> Layout:
        return cls(hidden[0].dtype, [tuple(batch.shape) for batch in hidden])

    @classmethod
    def read(cls, record: dict[str, Any]) -> Layout:
        """From what :meth:`record` gave."""
        return cls(getattr(torch, record["dtype"]), [tuple(shape) for shape in record["shapes"]])

    def record(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype).removeprefix("torch."), "shapes": [list(shape) for shape in self.shapes]}

    def begin(self, batch: int) -> int:
        """The byte at which a batch begins."""
        return sum(self.size(before) for before in range(batch))

    def size(self, batch: int) -> int:
        return torch.Size(self.shapes[batch]).numel() * self.dtype.itemsize


def write_batch(path: Path, layout: Layout, batch: int, hidden: Tensor) -> None:
    """Write one batch at its place, in a file that is there."""
    content = hidden.detach().to("cpu").contiguous().view(torch.uint8).flatten()
    with room_for(path.parent), path.open("r+b") as stream:
        stream.seek(layout.begin(batch))
        stream.write(content.numpy().data)


def read_batch(path: Path, layout: Layout, batch: int) -> Tensor:
    """One batch, on the CPU.

    Raises:
        ValueError: the file is not there, or is shorter than it should be.
    """
    shape = layout.shapes[batch]
    content = torch.empty(layout.size(batch), dtype=torch.uint8, device="cpu")
    try:
        with path.open("rb") as stream:
            stream.seek(layout.begin(batch))
            read = stream.readinto(content.numpy().data)
    except FileNotFoundError:
        read = -1
    if read != len(content):
        raise ValueError(f"the hidden states in {path} are {'gone' if read < 0 else 'truncated'}; begin the run anew")
    return content.view(layout.dtype).view(shape)


PRUNED, DENSE = "hidden", "dense"
"""The two streams of hidden states: what the pruned blocks make of the samples, and what the dense ones make."""


def name_of(block: int, stream: str = PRUNED) -> str:
    """The file of the hidden states in front of a block."""
    return f"{stream}-{block}.bin"


class SpooledHidden:
    """The hidden states of a walk in files: reads those in front of a block, writes those behind it into the next file.

    Args:
        folder: where the files are.
        layout: of the batches.
        device: where a batch that is read goes.
        block: the block in front of which the hidden states are; those of the first are appended.
        stream: ``hidden``, or ``dense`` for those of the dense model.
    """

    def __init__(
        self, folder: Path, layout: Layout, device: torch.device, block: int = 0, stream: str = PRUNED
    ) -> None:
        self.stream = stream
        self.folder, self.layout, self.block = folder, layout, block
        self.device = device
        self._batches = 0 if block == 0 else len(layout.shapes)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, batch: int) -> Tensor:
        return read_batch(self.folder / name_of(self.block, self.stream), self.layout, batch).to(self.device)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._write(self.block + 1, batch, hidden)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def append(self, hidden: Tensor) -> None:
        self._write(self.block, self._batches, hidden)
        self._batches += 1

    def turn(self) -> None:
        """The block is done: what was written is in front of the next one."""
        self.block += 1

    def _write(self, block: int, batch: int, hidden: Tensor) -> None:
        path = self.folder / name_of(block, self.stream)
        if batch == 0:
            path.write_bytes(b"")
        write_batch(path, self.layout, batch, hidden)


Hidden = list[Tensor] | SpooledHidden


def write_hidden(folder: Path, hidden: Hidden, block: int, stream: str = PRUNED) -> dict[str, Any]:
    """Bring the hidden states in front of ``block`` to the disk; returns what :func:`read_hidden` needs."""
    path = folder / name_of(block, stream)
    layout = hidden.layout if isinstance(hidden, SpooledHidden) else Layout.of(hidden)
    if not isinstance(hidden, SpooledHidden):
        path.write_bytes(b"")
        for batch, one in enumerate(hidden):
            write_batch(path, layout, batch, one)
    with room_for(folder), path.open("rb") as written:
        os.fsync(written.fileno())
    return {"file": path.name, "in_memory": isinstance(hidden, list), **layout.record()}


def read_hidden(folder: Path, record: dict[str, Any], block: int, device: torch.device, stream: str = PRUNED) -> Hidden:
    """The hidden states that :func:`write_hidden` wrote, in memory or left in the file as they were.

    Raises:
        ValueError: the file is not there, or is shorter than it should be.
    """
    layout = Layout.read(record)
    if not record["in_memory"]:
        return SpooledHidden(folder, layout, device, block, stream)
    path = folder / record["file"]
    return [read_batch(path, layout, batch).to(device) for batch in range(len(layout.shapes))]
