"""Processes that prune one model together, over ``torch.distributed``: gloo on CPUs, NCCL on GPUs.

Each runs its share of the samples. Hessians are summed; rows of a layer are shared out (:mod:`thanos.engine.peers`),
experts whole. All hold the same weights after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from thanos.engine.peers import Peers
from thanos.walk.decoder import Layer
from thanos.walk.hessians import InputHessian
from thanos_kernels.errors import first_line

T = TypeVar("T")

_WORTH_SHARING = 1 << 21  # weights of a layer
_UNEVEN = 1.25  # of the mean: what one process may have to do where whole layers are shared out
_FEW, _SMALL = 8, 1 << 16  # of so few processes and bytes, parts are gathered sooner than they are reduced


class PeerLostError(ValueError):
    """Another process ended, or cannot be reached."""


class Processes(Peers):
    """The processes of the default group.

    Args:
        device: where this process works; what is exchanged goes through its memory.
        local_size: how many of the processes are on this machine.
        waiting: called with True before this process waits for the others, and with False behind it.
    """

    def __init__(self, device: torch.device, local_size: int, waiting: Callable[[bool], None]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.local_size = device, local_size
        self._waiting = waiting

    def _wait(self, call: Callable[[], T]) -> T:
        self._waiting(True)
        try:
            return call()
        except RuntimeError as error:
            raise PeerLostError(f"another process of this run was lost ({first_line(error)})") from error
        finally:
            self._waiting(False)

    def sum(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if self.size <= _FEW and tensor.nbytes <= _SMALL:
            return torch.stack(self.gather(tensor)).sum(0, dtype=tensor.dtype)
        self._wait(lambda: dist.all_reduce(tensor))
        return tensor

    def sums(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.stack(self.gather(tensor))
        return parts.sum(0, dtype=torch.int64), parts[: self.rank].sum(0, dtype=torch.int64)

    def sum_at(self, rank: int, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._wait(lambda: dist.reduce(tensor, rank))
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, tensor))
        return parts

    def total(self, count: int) -> int:
        return int(self.sum(torch.tensor(count, dtype=torch.int64, device=self.device)))

    def bring(self, rank: int, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        if rank and rank == self.rank:
            self._wait(lambda: dist.send(tensor, 0))
        elif rank and self.rank == 0:
            self._wait(lambda: dist.recv(tensor, rank))
        return tensor

    def spread(self, rank: int, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._wait(lambda: dist.broadcast(tensor, rank))
        return tensor

    def objects(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._wait(lambda: dist.all_gather_object(found, value))
        return found

    def object(self, value: T, rank: int = 0) -> T:
        found: list[Any] = [value if rank == self.rank else None]
        self._wait(lambda: dist.broadcast_object_list(found, rank))
        return found[0]


def merged(inputs: InputHessian, peers: Peers) -> InputHessian:
    """The Hessian over the tokens of all processes, each of whom has seen some."""
    if peers.size == 1 or inputs.hessian is None:
        return inputs
    drift = inputs.drift
    own = [inputs.tokens, inputs.mass, drift is not None]
    tokens, mass, drifts = peers.sum(torch.tensor(own, dtype=torch.float64, device=inputs.hessian.device)).tolist()
    share = inputs.mass / mass
    result = inputs.of_all(peers.sum(inputs.hessian * share), int(tokens), mass)
    if drift is not None and drifts == peers.size:
        result.drift = peers.sum(drift * share)
    return result


def merge_experts(
    layers: Sequence[Layer], take: Callable[[Layer], InputHessian | None], peers: Peers
) -> dict[str, InputHessian | None]:
    """Each layer's Hessian at the process that prunes its expert, :func:`owner`; what others get is worthless.

    A process may have seen no token of an expert. Projections of one expert that share their input share its Hessian.
    """
    own = {layer.name: take(layer) for layer in layers}
    notes = peers.objects(
        {name: (seen.first, seen.tokens, seen.mass) for name, seen in own.items() if seen and seen.hessian is not None}
    )
    found: dict[str, InputHessian | None] = {}
    sums: dict[str, InputHessian] = {}
    for layer in layers:
        seen = [note[layer.name] for note in notes if layer.name in note]
        if not seen:
            found[layer.name] = None
            continue
        first, tokens, mass = seen[0][0], sum(one[1] for one in seen), sum(one[2] for one in seen)
        if first not in sums:
            inputs = own[layer.name] or InputHessian(first)
            part = _weighed(inputs, mass, layer)
            sums[first] = inputs.of_all(peers.sum_at(owner(layer, peers), part), tokens, mass)
        found[layer.name] = sums[first]
    return found


def owner(layer: Layer, peers: Peers) -> int:
    """The process that prunes an expert."""
    return layer.expert % peers.size


def owners(layers: Sequence[Layer], peers: Peers) -> list[int] | None:
    """Which process prunes which of some layers, all whole; None where that would leave too many with too little to do.

    Whole layers need no word with the others while they are pruned, where rows need several for each block of columns.
    """
    loads, found = [0] * peers.size, [0] * len(layers)
    for index in sorted(range(len(layers)), key=lambda index: -layers[index].weight.numel()):
        found[index] = loads.index(min(loads))
        loads[found[index]] += layers[index].weight.numel()
    return found if max(loads) * peers.size <= _UNEVEN * sum(loads) else None


def rows_are_worth_sharing(layer: Layer) -> bool:
    """Whether processes prune a layer sooner by sharing out its rows than by each pruning all of them.

    Each block of columns costs several exchanges, about a millisecond each among two processes of one machine: on
    576 x 1536 more than the half of the work that they save.
    """
    return layer.weight.numel() >= _WORTH_SHARING


def _weighed(inputs: InputHessian, mass: float, layer: Layer) -> Tensor:
    if inputs.hessian is not None:
        return inputs.hessian * (inputs.mass / mass)
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape[1], weight.shape[1], dtype=dtype, device=weight.device)


def spread_layers(owned: Iterable[tuple[Layer, int]], reports: dict[str, Any], peers: Peers) -> None:
    """Give everybody the layers that each process pruned whole, in place, and the reports of them."""
    mine = {}
    for layer, rank in owned:
        weight = peers.spread(rank, layer.weight.contiguous())
        if rank != peers.rank:
            layer.weight.copy_(weight)
        elif layer.name in reports:
            mine[layer.name] = reports[layer.name]
    for part in peers.objects(mine):
        reports.update(part)


def batches_of_all(count: int, size: int, peers: Peers) -> list[tuple[int, int, int]]:
    """Everybody's batches of at most ``size`` of so many samples, in their order: whose, where it begins, how many."""
    return [
        (rank, begin, min(size, part.stop - begin))
        for rank, part in enumerate(peers.parts(count))
        for begin in range(part.start, part.stop, size)
    ]
