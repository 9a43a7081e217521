"""Peers that are threads of this process, to try what processes do together without any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from thanos.engine.peers import Peers


class ThreadPeers(Peers):
    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def _all(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor.clone())).sum(0).to(tensor.dtype)

    def sums(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.stack(self._all(tensor.clone()))
        return parts.sum(0), parts[: self.rank].sum(0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [part.clone() for part in self._all(tensor)]

    def total(self, count: int) -> int:
        return sum(self._all(count))


def together(size: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What ``work`` gives each of so many peers."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)
    peers = [ThreadPeers(rank, size, board, barrier) for rank in range(size)]

    def run(one: Peers) -> Any:
        try:
            return work(one)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return [done.result() for done in [pool.submit(run, one) for one in peers]]
