"""Hidden states in files: those that a run goes on from, and those that do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint import room_for
from thanos.engine.peers import Peers


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
        raise ValueError(
            f"the hidden states in {path} are {'missing' if read < 0 else 'truncated'}; begin the run anew"
        )
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

    def move(self, block: int) -> None:
        """All was appended: it is in front of this block."""
        (self.folder / name_of(self.block, self.stream)).replace(self.folder / name_of(block, self.stream))
        self.block = block

    def turn(self) -> None:
        """The block is done: what was written is in front of the next one."""
        self.block += 1

    def _write(self, block: int, batch: int, hidden: Tensor) -> None:
        path = self.folder / name_of(block, self.stream)
        if batch == 0:
            path.write_bytes(b"")
        write_batch(path, self.layout, batch, hidden)


Hidden = list[Tensor] | SpooledHidden


def forget_hidden(folder: Path, before: int) -> None:
    """Remove the hidden states in front of earlier blocks."""
    for path in (path for stream in (PRUNED, DENSE) for path in folder.glob(f"{stream}-*.bin")):
        if int(path.stem.split("-")[1]) < before:
            path.unlink()


def brought(hidden: Hidden, batches: Sequence[tuple[int, int, int]], peers: Peers) -> Iterator[Tensor]:
    """Everybody's hidden states, batch by batch, at the first process; at the others nothing, but they must ask too.

    Args:
        batches: as for :func:`read_hidden`.
    """
    one, own = hidden[0], iter(hidden)
    for rank, _, count in batches:
        states = next(own) if rank == peers.rank else one
        if rank:
            states = peers.bring(rank, states if rank == peers.rank else one.new_empty((count, *one.shape[1:])))
        if peers.rank == 0:
            yield states


def write_hidden(
    folder: Path,
    hidden: Hidden,
    block: int,
    batches: Sequence[tuple[int, int, int]],
    peers: Peers,
    stream: str = PRUNED,
) -> dict[str, Any]:
    """Bring everybody's hidden states in front of ``block`` into a file of the first process.

    Args:
        batches: as for :func:`read_hidden`.

    Returns:
        What that needs.
    """
    path = folder / name_of(block, stream)
    one = hidden[0]
    layout = Layout(one.dtype, [(count, *one.shape[1:]) for _, _, count in batches])
    if peers.size > 1 or not isinstance(hidden, SpooledHidden):
        if peers.rank == 0:
            path.write_bytes(b"")
        every = brought(hidden, batches, peers) if peers.size > 1 else hidden
        for batch, states in enumerate(every):
            write_batch(path, layout, batch, states)
    return {"file": path.name, "in_memory": isinstance(hidden, list), **layout.record()}


def read_hidden(
    folder: Path,
    record: dict[str, Any],
    block: int,
    batches: Sequence[tuple[int, int, int]],
    peers: Peers,
    device: torch.device,
    own_folder: Path,
    stream: str = PRUNED,
) -> Hidden:
    """This process' part of the hidden states that :func:`write_hidden` wrote.

    The first process reads the file and gives the others what is theirs, in memory or in files of their own, as it was.

    Args:
        batches: of all processes in the order of the samples: whose, where it begins, how many samples.

    Raises:
        ValueError: the file is not there, or is shorter than it should be.
    """
    whole = Layout.read(record)
    shape = whole.shapes[0][1:]
    own = Layout(whole.dtype, [(count, *shape) for rank, _, count in batches if rank == peers.rank])
    if not record["in_memory"] and peers.size == 1:
        return SpooledHidden(folder, own, device, block, stream)
    hidden: Hidden = [] if record["in_memory"] else SpooledHidden(own_folder, own, device, stream=stream)
    every = Layout(whole.dtype, [(count, *shape) for _, _, count in batches])
    for batch, (rank, _, count) in enumerate(batches):
        states = torch.empty((count, *shape), dtype=whole.dtype, device=device)
        if peers.rank == 0:
            states = read_batch(folder / record["file"], every, batch).to(device)
        states = peers.spread(0, states)
        if rank == peers.rank:
            hidden.append(states)
    if isinstance(hidden, SpooledHidden):
        hidden.move(block)
    return hidden
