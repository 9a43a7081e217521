"""Writing a walk down after each block, and going on with one that was written down.

A block is always read from the source and never from the copy that is being written, so one that was being written
when the run was killed is simply done again. The order is: the block's tensors, the hidden states in front of the next
block, and then, by one rename, the state that speaks of both. A thread of its own does that while the walk goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thanos.allocate import SearchState
from thanos.checkpoint import Partial, Patches, room_for, sync, sync_tree
from thanos.checkpoint.partial import PREPARING, WALKING
from thanos.engine.peers import ALONE, Peers
from thanos.options import WalkOptions
from thanos.report import BlockReport, LayerReport
from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder, Layer
from thanos.walk.distributed import batches_of_all
from thanos.walk.plan import Plan, copied, make_plan
from thanos.walk.spool import DENSE, PRUNED, Hidden, SpooledHidden, brought, forget_hidden, read_hidden, write_hidden
from thanos.walk.store import Stores, in_memory
from thanos.walk.walk import State

_SETTLED = ("passes", "batch_size", "memory_limit")


class Keeper:
    """Keeps a walk in a :class:`Partial`.

    Args:
        partial: checked, and perhaps found.
        identity: what the run depends on.
        prepare: ``prepare(names, folder)`` fills a directory with the dense model, in which the parameters of these
            names will change.
        restored: gives the model that a directory holds, in memory; None where blocks are not kept in memory.
        notes: what else is to be written down and found again.
    """

    def __init__(
        self,
        partial: Partial,
        identity: Mapping[str, Any],
        prepare: Callable[[Iterable[str], Path], object],
        restored: Callable[[Path], Any] | None,
        notes: dict[str, Any],
    ) -> None:
        self._partial, self._identity, self._prepare, self._restored = partial, identity, prepare, restored
        self.notes = notes
        self.notes.update(partial.state.get("notes", {}))
        self._patches: Patches | None = None
        self._batches: list[tuple[int, int, int]] = []
        self._changed: dict[str, Tensor] = {}
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def begin(
        self,
        model: nn.Module,
        decoder: Decoder,
        samples: Tensor,
        options: WalkOptions,
        clock: Clock,
        layers: list[Layer],
        stores: Stores = in_memory,
        peers: Peers = ALONE,
    ) -> tuple[Plan, State]:
        """The plan and the state that the walk begins with: that of the first block, or of the one that was reached.

        Args:
            layers: those that are to be pruned.
            stores, peers: see :func:`make_plan`. The first of the processes alone reads and writes.
        """
        partial, first = self._partial, peers.rank == 0
        with room_for(partial.folder):
            if first:
                partial.begin(self._identity)
            settled = peers.object(partial.state.get("settled", {}))
            plan, hidden = make_plan(
                model, decoder, samples, dataclasses.replace(options, **settled), clock, self._own(peers), stores, peers
            )
            if first and partial.phase == PREPARING:
                partial.empty()
                names = {layer.parameter_name for layer in layers}
                if options.reconstruct:
                    names.update(*plan.vectors)
                self._prepare(sorted(names), partial.model)
                sync_tree(partial.model)
                settled = {name: getattr(plan, name) for name in _SETTLED}
                partial.save(phase=WALKING, block=0, settled=settled, notes=self.notes)
        if first:
            self._patches = Patches(model, partial.model)
        self._batches = batches_of_all(len(samples), plan.batch_size, peers)
        found = peers.object(partial.state)
        if not found["block"]:
            return plan, State(hidden, dense=copied(hidden) if options.beside else None)
        state = self._found(found, plan, model, layers)
        if first:
            forget_hidden(partial.folder, found["block"])
        return plan, state

    def _own(self, peers: Peers) -> Path:
        """Where this process keeps hidden states that do not fit into memory."""
        folder = self._partial.folder if peers.size == 1 else self._partial.rank(peers.rank)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def patch(self, names: set[str]) -> None:
        """Take the parameters that a block changed, to be written over those of the dense model by :meth:`keep`."""
        assert self._patches is not None
        self._changed = self._patches.collect(names)

    def keep(self, state: State, plan: Plan, clock: Clock) -> None:
        """Write down that the blocks before ``state.block`` are done, while the walk goes on; see :meth:`finish`."""
        self.finish()
        partial, peers = self._partial, plan.peers
        if isinstance(state.hidden, SpooledHidden):
            state.hidden.turn()
        with clock("other"):
            streams: dict[str, Hidden | dict[str, Any]] = {}
            if state.block < len(plan.store):
                for stream, states in {PRUNED: state.hidden, DENSE: state.dense}.items():
                    if states is not None:
                        streams[stream] = self._of_all(states, state.block, plan, stream)
                if peers.size > 1:
                    forget_hidden(self._own(peers), state.block)
            if peers.rank:
                partial.state = {"block": state.block}  # for what is said where this process fails
            else:
                found = {
                    "block": state.block,
                    "counts_wanted": state.counts_wanted,
                    "blocks": [dataclasses.asdict(report) for report in state.blocks],
                    "reports": [dataclasses.asdict(report) for report in state.reports.values()],
                    "counts": list(state.counts),
                    "notes": dict(self.notes),
                    "seconds": _summed(state.seconds, clock.stop()),
                }
                changed, self._changed = self._changed, {}
                self._writing = self._writer.submit(self._write, changed, streams, found)

    def _of_all(self, states: Hidden, block: int, plan: Plan, stream: str) -> Hidden | dict[str, Any]:
        """All processes' hidden states at the first, to be written; what of them lies in a file already, as it is.

        Where they do not fit into memory together they go to the file at once, batch by batch.
        """
        peers = plan.peers
        if peers.size == 1:
            return states if isinstance(states, SpooledHidden) else list(states)
        each = states[0][0].nbytes
        fits = each * sum(count for _, _, count in self._batches) <= plan.memory_limit
        if isinstance(states, list) and (fits or peers.rank):
            return list(brought(states, self._batches, peers))
        return write_hidden(self._partial.folder, states, block, self._batches, peers, stream)

    def searched(self) -> SearchState | None:
        """Where an unfinished search for an allocation stopped."""
        found = self._partial.state.get("search")
        return SearchState(**found) if found else None

    def keep_search(self, state: SearchState) -> None:
        """Write down how far the search for an allocation is."""
        with room_for(self._partial.folder):
            self._partial.save(search=dataclasses.asdict(state))

    def finish(self) -> None:
        """Wait until all that was to be kept is on the disk; raises what went wrong there."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, changed: dict[str, Tensor], streams: dict[str, Hidden | dict[str, Any]], found: dict[str, Any]
    ) -> None:
        """Bring a block's tensors, then the hidden states (or where they were written), then the state to the disk."""
        partial, block = self._partial, found["block"]
        with room_for(partial.folder):
            if changed and self._patches is not None:
                self._patches(changed)
            spools: dict[str, dict[str, Any]] = {}
            for stream, states in streams.items():
                if isinstance(states, dict):
                    spools[stream] = states
                else:
                    spools[stream] = write_hidden(partial.folder, states, block, self._batches, ALONE, stream)
                sync(partial.folder / spools[stream]["file"])
            partial.save(**found, spool=spools.get(PRUNED), dense=spools.get(DENSE))
            forget_hidden(partial.folder, block if spools else block + 1)

    def _found(self, found: dict[str, Any], plan: Plan, model: nn.Module, layers: list[Layer]) -> State:
        """The state that was written down; blocks that are in memory get their pruned weights."""
        folder, peers = self._partial.folder, plan.peers
        block, spool = found["block"], found["spool"]
        reports = {one["name"]: LayerReport(**{**one, "shape": tuple(one["shape"])}) for one in found["reports"]}
        hidden: Hidden = []
        if spool is not None:
            hidden = read_hidden(folder, spool, block, self._batches, peers, plan.device, self._own(peers))
        beside, dense = found.get("dense"), None
        if beside is not None:
            dense = read_hidden(folder, beside, block, self._batches, peers, plan.device, self._own(peers), DENSE)
        blocks = [BlockReport(**{**one, "parameters": tuple(one["parameters"])}) for one in found.get("blocks", [])]
        if self._restored is not None:
            pruned = self._restored(self._partial.model) if peers.rank == 0 else model
            trained = {name for report in blocks for name in report.parameters}
            for name in sorted(trained | {layer.parameter_name for layer in layers if layer.name in reports}):
                own = model.get_parameter(name).data
                own.copy_(peers.spread(0, pruned.get_parameter(name).data.to(own.device)))
        counts = [(zeros, total) for zeros, total in found["counts"]]
        return State(hidden, block, reports, counts, found["seconds"], dense, blocks, found.get("counts_wanted"))


def _summed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {part: seconds + before.get(part, 0.0) for part, seconds in now.items()}
