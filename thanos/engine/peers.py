"""Processes that share out the rows of a layer: what the engine asks of them, and the selection over all their rows.

Row solves, sweeps, refits and the selection of n:m never look at another row. Only sums do, and the global mask, whose
threshold is found from counts that add up.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

import thanos_kernels as kernels

T = TypeVar("T")


class Peers:
    """The processes that prune a layer together. This one is alone; ``thanos.walk.distributed`` has those of torchrun.

    All processes call the same methods in the same order.

    Attributes:
        rank: which of them this is, from 0.
        size: how many there are.
        local_size: how many of them share this machine's memory.
    """

    rank = 0
    size = 1
    local_size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's ``tensor``, the same bits for all; may be the tensor itself, overwritten."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's ``tensor``, all of one shape and dtype, in the order of the ranks."""
        return [tensor]

    def total(self, count: int) -> int:
        """The sum of everybody's count."""
        return count

    def sums(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of everybody's ``tensor``, and of those of lower ranks, int64."""
        return tensor.long(), torch.zeros_like(tensor, dtype=torch.int64)

    def sum_at(self, rank: int, tensor: Tensor) -> Tensor:
        """The sum of everybody's ``tensor`` at one of them; what the others get is worthless."""
        return tensor

    def bring(self, rank: int, tensor: Tensor) -> Tensor:
        """The ``tensor`` of one, at the first, which gives one of its shape and dtype to be overwritten."""
        return tensor

    def spread(self, rank: int, tensor: Tensor) -> Tensor:
        """The ``tensor`` of one, for all; the others give one of its shape and dtype, which is overwritten."""
        return tensor

    def objects(self, value: T) -> list[T]:
        """Everybody's ``value``, any that can be pickled, in the order of the ranks."""
        return [value]

    def object(self, value: T, rank: int = 0) -> T:
        """The ``value`` of one, for all."""
        return value

    def parts(self, count: int) -> list[slice]:
        """Everybody's part of so many things; the parts follow each other, and none is longer than another by two."""
        ends = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(begin, end) for begin, end in pairwise(ends)]

    def share(self, rows: Tensor) -> Tensor:
        """This process' part of ``rows`` (n, ...), see :meth:`parts`."""
        return rows[self.parts(len(rows))[self.rank]]

    def join(self, rows: Tensor, own: Tensor, whole: Tensor) -> Tensor:
        """Write everybody's ``own`` values (their share of ``rows``, ...) into ``whole`` (c, ...) at ``rows`` (n,)."""
        if self.size == 1:
            return whole.index_copy_(0, rows, own)
        longest = -(-len(rows) // self.size)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
        for place, part in zip(self.parts(len(rows)), self.gather(padded), strict=True):
            whole.index_copy_(0, rows[place], part[: place.stop - place.start])
        return whole


ALONE = Peers()


def select_smallest(
    weights: Tensor, norms: Tensor, count: int | Tensor, width: int, peers: Peers, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """This process' rows of :func:`thanos_kernels.select_smallest` over the rows of all, in the order of the ranks.

    Args:
        weights: (n, b), this process' rows.
        norms, width: as there, the same for all.
        count: of everybody's weights, the same for all.

    Returns:
        The mask (n, width), and how many weights all masks hold together, 0-d int64.
    """
    if peers.size == 1:
        return kernels.select_smallest(weights, norms, count, width, backend=backend)
    rank = torch.as_tensor(count, dtype=torch.int64, device=weights.device)
    threshold = torch.zeros((), dtype=torch.int64, device=weights.device)
    for digit, (_, bits) in enumerate(kernels.score_digits(weights.dtype)):
        own = kernels.count_scores(weights, norms, threshold, digit, backend=backend)
        counts, before = peers.sums(own.to(torch.int32))
        reached = counts.cumsum(0)
        found = torch.searchsorted(reached, rank).clamp(max=len(counts) - 1)
        rank = rank - (reached[found] - counts[found])
        threshold, ties, earlier = (threshold << bits) | found, own[found], before[found]
    ties = torch.minimum((rank - earlier).clamp(min=0), ties)
    mask, taken = kernels.select_below(weights, norms, threshold, ties, width, backend=backend)
    return mask, peers.sum(taken)
