"""Writing a walk down after each block, and going on with one that was written down.

A block is always read from the source and never from the copy that is being written, so one that was being written
when the run was killed is simply done again. The order is: the block's tensors, the hidden states in front of the next
block, and then, by one rename, the state that speaks of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thanos.checkpoint import Partial, Patches, room_for, sync_tree
from thanos.checkpoint.partial import PREPARING, WALKING
from thanos.options import WalkOptions
from thanos.report import BlockReport, LayerReport
from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder, Layer
from thanos.walk.plan import Plan, copied, make_plan
from thanos.walk.spool import DENSE, PRUNED, SpooledHidden, read_hidden, write_hidden
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

    def begin(
        self,
        model: nn.Module,
        decoder: Decoder,
        samples: Tensor,
        options: WalkOptions,
        clock: Clock,
        layers: list[Layer],
        stores: Stores = in_memory,
    ) -> tuple[Plan, State]:
        """The plan and the state that the walk begins with: that of the first block, or of the one that was reached.

        Args:
            layers: those that are to be pruned.
            stores: see :func:`make_plan`.
        """
        partial = self._partial
        with room_for(partial.folder):
            partial.begin(self._identity)
            options = dataclasses.replace(options, **partial.state.get("settled", {}))
            plan, hidden = make_plan(model, decoder, samples, options, clock, partial.folder, stores)
            if partial.phase == PREPARING:
                partial.empty()
                names = {layer.parameter_name for layer in layers}
                if options.reconstruct:
                    names.update(*plan.vectors)
                self._prepare(sorted(names), partial.model)
                sync_tree(partial.model)
                settled = {name: getattr(plan, name) for name in _SETTLED}
                partial.save(phase=WALKING, block=0, settled=settled, notes=self.notes)
        self._patches = Patches(model, partial.model)
        if not partial.state["block"]:
            return plan, State(hidden, dense=copied(hidden) if options.beside else None)
        state = self._found(plan, model, layers)
        self._forget_others(partial.state["spool"], partial.state.get("dense"))
        return plan, state

    def patch(self, names: set[str]) -> None:
        """Write the parameters that a block changed over those of the dense model."""
        assert self._patches is not None
        with room_for(self._partial.folder):
            self._patches(names)

    def keep(self, state: State, blocks: int, clock: Clock) -> None:
        """Write down that those before ``state.block`` of so many blocks are done."""
        partial, spool, dense = self._partial, None, None
        if isinstance(state.hidden, SpooledHidden):
            state.hidden.turn()
        with clock("other"), room_for(partial.folder):
            if state.block < blocks:
                spool = write_hidden(partial.folder, state.hidden, state.block)
                if state.dense is not None:
                    dense = write_hidden(partial.folder, state.dense, state.block, DENSE)
            found = {
                "block": state.block,
                "spool": spool,
                "dense": dense,
                "counts_wanted": state.counts_wanted,
                "blocks": [dataclasses.asdict(report) for report in state.blocks],
                "reports": [dataclasses.asdict(report) for report in state.reports.values()],
                "counts": state.counts,
                "notes": self.notes,
            }
            partial.save(**found, seconds=_summed(state.seconds, clock.stop()))
            self._forget_others(spool, dense)

    def _found(self, plan: Plan, model: nn.Module, layers: list[Layer]) -> State:
        """The state that was written down; blocks that are in memory get their pruned weights."""
        folder, found = self._partial.folder, self._partial.state
        block, spool = found["block"], found["spool"]
        reports = {one["name"]: LayerReport(**{**one, "shape": tuple(one["shape"])}) for one in found["reports"]}
        hidden = [] if spool is None else read_hidden(folder, spool, block, plan.device)
        beside = found.get("dense")
        dense = None if beside is None else read_hidden(folder, beside, block, plan.device, DENSE)
        blocks = [BlockReport(**{**one, "parameters": tuple(one["parameters"])}) for one in found.get("blocks", [])]
        if self._restored is not None:
            pruned = self._restored(self._partial.model)
            trained = {name for report in blocks for name in report.parameters}
            for name in sorted(trained | {layer.parameter_name for layer in layers if layer.name in reports}):
                model.get_parameter(name).data.copy_(pruned.get_parameter(name))
        counts = [(zeros, total) for zeros, total in found["counts"]]
        return State(hidden, block, reports, counts, found["seconds"], dense, blocks, found.get("counts_wanted"))

    def _forget_others(self, *spools: dict[str, Any] | None) -> None:
        kept = {spool["file"] for spool in spools if spool is not None}
        for path in (path for stream in (PRUNED, DENSE) for path in self._partial.folder.glob(f"{stream}-*.bin")):
            if path.name not in kept:
                path.unlink()


def _summed(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    return {part: seconds + before.get(part, 0.0) for part, seconds in now.items()}
