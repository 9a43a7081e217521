"""The walk: one decoder block after the other, each on what the pruned blocks before it make of the samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from thanos.engine.factor import Factor, HessianNotFiniteError, converted, more_damped
from thanos.engine.layer import PrunedWeight, factor_for, prune_layer
from thanos.engine.peers import ALONE, Peers
from thanos.engine.targets import corrected_target, correction_of
from thanos.engine.timing import StepTimer
from thanos.options import WalkOptions
from thanos.pattern import Unstructured
from thanos.report import BlockReport, LayerReport
from thanos.walk.clock import Clock
from thanos.walk.decoder import Layer
from thanos.walk.dense import ROUTED, UNMATCHED, DenseInputs
from thanos.walk.distributed import merge_experts, merged, owner, owners, rows_are_worth_sharing, spread_layers
from thanos.walk.events import Progress
from thanos.walk.finite import check_finite
from thanos.walk.hessians import Collector, InputHessian
from thanos.walk.plan import Plan
from thanos.walk.reconstruct import Task, local_names, reconstruct
from thanos.walk.spool import Hidden, SpooledHidden
from thanos.walk.zeros import count_zeros

POOL_WEIGHT = 1.0  # of the pool in an expert's Hessian, in tokens for each of its columns (docs/method.md, section 13)


@dataclass
class State:
    """All that the walk knows between two blocks: what a run that goes on from here needs.

    Attributes:
        hidden: the hidden states (n, S, d) of each batch in front of ``block``, contiguous.
        block: the next block to prune; those before it are done.
        reports: the pruned layers by name, in their order.
        counts: of each block that is done, the weights that are zero and all weights.
        seconds: what the parts of the walk took in earlier processes.
        dense: where the dense model runs beside the pruned one, its hidden states in front of ``block``.
        blocks: the reconstructions so far.
        counts_wanted: how many weights each layer loses, where that is not the same share of each.
    """

    hidden: Hidden
    block: int = 0
    reports: dict[str, LayerReport] = field(default_factory=dict)
    counts: list[tuple[int, int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    dense: Hidden | None = None
    blocks: list[BlockReport] = field(default_factory=list)
    counts_wanted: dict[str, int] | None = None


@dataclass(frozen=True)
class Walk:
    """What stays the same during a walk.

    Attributes:
        chosen: names of the layers to prune.
        patch: called with the names of the parameters that changed in a block, before it is given back.
        peers: the processes that walk together.
    """

    plan: Plan
    options: WalkOptions
    chosen: frozenset[str]
    clock: Clock
    progress: Callable[[Progress], None] | None
    patch: Callable[[set[str]], None] | None = None
    peers: Peers = ALONE

    def prune_block(self, state: State) -> None:
        """Prune the block ``state.block`` and replace the hidden states by what it makes of them."""
        index, plan = state.block, self.plan
        module = plan.store.load(index, plan.device)
        layers = [layer for layer in plan.decoder.layers[index] if layer.name in self.chosen]
        if not plan.store.resident:
            check_finite(layers)
        block = BlockWork(self, state)
        if plan.passes == 1:
            keep = not self.options.reconstruct
            self._forward(module, state, keep=keep, watched=Watched(block, layers, block.prune_before_it_runs))
        else:
            self._two_passes(module, layers, block, state)
        if isinstance(state.dense, SpooledHidden):
            state.dense.turn()
        trained = self._reconstructed(module, layers, state) if self.options.reconstruct else ()
        if self.options.reconstruct or plan.passes == 2:
            self._forward(module, state, keep=True)
        state.counts.append(count_zeros(module, plan.decoder.layers[index], state.reports))
        if self.patch is not None:
            with self.clock("other"):
                self.patch({layer.parameter_name for layer in layers if layer.name in state.reports} | set(trained))
        plan.store.store(index)
        state.block += 1

    def _two_passes(self, module: nn.Module, layers: list[Layer], block: BlockWork, state: State) -> None:
        """Collect all Hessians of the dense block, and prune; the block is to be run once more.

        Experts are taken in groups whose Hessians fit the memory limit, one forward a group. Nothing inside the block
        reads what an expert gives, so those that are pruned already change no other layer's input.
        """
        others = [layer for layer in layers if layer.experts is None]
        groups = expert_groups([layer for layer in layers if layer.experts is not None], self.plan.memory_limit)
        for number, group in enumerate(groups or [[]]):
            some = group if number else others + group
            self._forward(module, state, keep=False, watched=Watched(block, some, block.collect, not number))
            block.prune_experts(group)
        for layer in others:
            block.prune(layer)

    def _forward(self, module: nn.Module, state: State, *, keep: bool, watched: Watched | None = None) -> None:
        """Run the block on all batches; the dense model's batch first, the first time that layers are watched."""
        with self.clock("forward"):
            for batch, calls in enumerate(self.plan.calls):
                if watched is not None and watched.first and state.dense is not None:
                    self._dense(module, state, batch, watched.block, watched.layers)
                with watched() if watched is not None else nullcontext():
                    hidden = calls[state.block](module, state.hidden[batch])
                if keep:
                    state.hidden[batch] = hidden.contiguous()
                if watched is not None:
                    watched.block.caught.clear()

    def _dense(self, module: nn.Module, state: State, batch: int, block: BlockWork, layers: list[Layer]) -> None:
        """Take one batch of the dense model through the block, whose weights are still all there."""
        assert state.dense is not None
        hidden = state.dense[batch]
        with block.caught.watching(layers if block.corrects else [], hidden):
            state.dense[batch] = self.plan.dense_calls[batch][state.block](module, hidden).contiguous()

    def _reconstructed(self, module: nn.Module, layers: list[Layer], state: State) -> tuple[str, ...]:
        """Train the pruned block; the names of the parameters that changed."""
        index, plan = state.block, self.plan
        assert state.dense is not None
        whole = {layer.parameter_name for layer in layers if layer.name in state.reports}
        whole -= {layer.parameter_name for layer in plan.decoder.layers[index] if layer.name not in self.chosen}
        weights, vectors = local_names(module, sorted(whole)), local_names(module, plan.vectors[index])
        with self.clock("reconstruct"):
            task = Task(index, module, plan.steps, state.hidden, state.dense, weights, vectors, self.peers)
            report = reconstruct(task, self.options.reconstruct, state.blocks)
        state.blocks.append(report)
        if self.progress is not None:
            self.say(state, f"block {index}, trained", report.after)
        for layer in layers if report.parameters else []:
            if layer.name in state.reports:
                zeros = layer.weight.numel() - int(layer.weight.count_nonzero())
                pruned = replace(state.reports[layer.name], zeros=zeros, sparsity=zeros / layer.weight.numel())
                state.reports[layer.name] = pruned
        return report.parameters

    def say(self, state: State, layer: str, relative_loss: float | None) -> None:
        """Tell how far the walk is."""
        if self.progress is not None:
            with self.clock("other"):
                blocks, done, layers = len(self.plan.store), len(state.reports), len(self.chosen)
                seconds = self.clock.elapsed() + state.seconds.get("total", 0.0)
                self.progress(Progress(state.block, blocks, layer, done, layers, relative_loss, seconds))


@dataclass(frozen=True)
class Watched:
    """Layers of a block that are watched while it runs.

    Attributes:
        seen: called before each is used, see :meth:`Collector.watching`.
        first: whether the block runs for the first time, so that the pools of experts are collected too.
    """

    block: BlockWork
    layers: list[Layer]
    seen: Callable[[Layer, Tensor, Tensor | None], None]
    first: bool = True

    def __call__(self) -> AbstractContextManager[None]:
        return self.block.collector.watching(self.layers, self.seen, pools=self.first)


def expert_groups(layers: list[Layer], limit: int) -> list[list[Layer]]:
    """Whole experts in groups whose Hessians, in float32, take at most ``limit`` bytes; at least one each."""
    of_expert: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        of_expert.setdefault((id(layer.experts), layer.expert), []).append(layer)
    groups: list[list[Layer]] = []
    used = 0
    for projections in of_expert.values():
        size = sum(4 * layer.weight.shape[1] ** 2 for layer in projections)
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1] += projections
        used += size
    return groups


class BlockWork:
    """One block on its way: the Hessians of its inputs, and the factors that layers share."""

    def __init__(self, walk: Walk, state: State) -> None:
        options = walk.options
        self.corrects = options.targets == "corrected" and options.correction > 0
        self.caught = DenseInputs()
        caught = self.caught if self.corrects else None
        together = walk.plan.passes == 1 and walk.peers.size == 1
        samples = walk.plan.batch_size if together else 1
        self.collector = Collector(options.backend, options.experts == "all", caught, samples)
        self._corrections: WeakKeyDictionary[InputHessian, dict[torch.dtype, Tensor]] = WeakKeyDictionary()
        self._walk = walk
        self._state = state
        self._merged: WeakKeyDictionary[InputHessian, InputHessian] = WeakKeyDictionary()
        self._blended: WeakKeyDictionary[InputHessian, InputHessian] = WeakKeyDictionary()
        self._factors: WeakKeyDictionary[InputHessian, dict[torch.dtype, Factor]] = WeakKeyDictionary()

    def collect(self, layer: Layer, inputs: Tensor, scale: Tensor | None) -> None:
        with self._walk.clock("hessian"):
            self.collector.add(layer, inputs, scale)

    def prune_before_it_runs(self, layer: Layer, inputs: Tensor, scale: Tensor | None) -> None:
        """One pass: all of a layer's input is here, so it is pruned before it runs."""
        if layer.name not in self._state.reports:
            self.collect(layer, inputs, scale)
            self.prune(layer)

    def prune(self, layer: Layer) -> None:
        """Prune a layer in place on what was collected for it; nothing where no token reached it."""
        if layer.name in self._state.reports:
            return
        peers, inputs = self._walk.peers, self._all_saw(self.collector.take(layer))
        layers = [one for one in self._walk.plan.together.get(layer.name, []) if one.name in self._walk.chosen]
        shared = owners(layers, peers) if peers.size > 1 and len(layers) > 1 else None
        if shared is None:
            self._prune(layer, inputs, peers if rows_are_worth_sharing(layer) else ALONE)
            return
        for one, rank in zip(layers, shared, strict=True):
            if rank == peers.rank:
                self._prune(one, inputs, ALONE)
        spread_layers(zip(layers, shared, strict=True), self._state.reports, peers)

    def prune_experts(self, layers: list[Layer]) -> None:
        """Prune some experts' projections in place; processes share them out whole."""
        peers, take = self._walk.peers, self.collector.take
        if peers.size == 1:
            for layer in layers:
                self._prune(layer, take(layer), peers)
        elif layers:
            inputs = merge_experts(layers, take, peers)
            for layer in layers:  # all processes sum up the pools in the same order
                self._all_saw(self.collector.pool(layer))
            for layer in layers:
                if owner(layer, peers) == peers.rank:
                    self._prune(layer, inputs[layer.name], ALONE)
            spread_layers([(layer, owner(layer, peers)) for layer in layers], self._state.reports, peers)

    def _all_saw(self, inputs: InputHessian | None) -> InputHessian | None:
        """What all processes saw of an input."""
        if inputs is None or self._walk.peers.size == 1:
            return inputs
        if inputs not in self._merged:
            self._merged[inputs] = merged(inputs, self._walk.peers)
        return self._merged[inputs]

    def _prune(self, layer: Layer, inputs: InputHessian | None, peers: Peers) -> None:
        inputs, pool_share = self.inputs(layer, inputs)
        if inputs is None or inputs.hessian is None:
            return
        walk, counts = self._walk, self._state.counts_wanted
        if counts is not None and layer.name not in counts:
            return
        walk.say(self._state, layer.name, None)
        with walk.clock("prune"):
            try:
                pruned = self._pruned(layer, inputs, peers)
            except HessianNotFiniteError:
                raise ValueError(f"{layer.name}: the activations that reach it hold NaN or infinity") from None
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise type(error)(f"{layer.name}: {error}") from error
            layer.weight.copy_(pruned.weight)
        report = _report(layer, inputs, pool_share, pruned)
        if self.corrects and inputs.drift is None:
            report = replace(report, own_target=UNMATCHED if layer.experts is None else ROUTED)
        self._state.reports[layer.name] = report
        walk.say(self._state, layer.name, report.relative_loss)

    def inputs(self, layer: Layer, seen: InputHessian | None) -> tuple[InputHessian | None, float]:
        """What a layer is pruned on, of what it saw, and the share that all experts beside it have in that."""
        inputs, pool = seen, self._all_saw(self.collector.pool(layer))
        if pool is None or pool.hessian is None or self._walk.options.experts == "all":
            return inputs, 0.0
        weight = POOL_WEIGHT * len(pool.hessian)
        if inputs is None or inputs.hessian is None:
            return pool, 1.0
        if inputs not in self._blended:
            self._blended[inputs] = inputs.blended(pool, weight)
        return self._blended[inputs], weight / (inputs.tokens + weight)

    def _pruned(self, layer: Layer, inputs: InputHessian, peers: Peers) -> PrunedWeight:
        assert inputs.hessian is not None
        options = self._walk.options
        timed = StepTimer(inputs.hessian.device)
        dtype = torch.promote_types(layer.weight.dtype, inputs.hessian.dtype)
        shared = self._factors.setdefault(inputs, {})
        with timed("factor"):
            if dtype not in shared:
                shared[dtype] = factor_for(inputs.hessian, dtype, options)
        target = None
        if inputs.drift is not None:
            with timed("target"):
                shared[dtype], target = self._target(layer, inputs, shared[dtype])
        if (counts := self._state.counts_wanted) is not None:
            share = (counts[layer.name] + 0.5) / layer.weight.numel()  # rounded down, it is the count
            options = replace(options, pattern=Unstructured(share))
        return prune_layer(layer.weight, shared[dtype], options, timed, energy=True, peers=peers, target=target)

    def _target(self, layer: Layer, inputs: InputHessian, factor: Factor) -> tuple[Factor, Tensor]:
        """The factor, with an inverse if it had none, and the corrected weight; layers of one input share the drift."""
        assert inputs.drift is not None
        options, dtype = self._walk.options, factor.hessian.dtype
        factor = converted(factor, dtype, True, options.backend)
        while int(factor.failed):
            factor = more_damped(factor, options.backend)
        assert factor.upper is not None
        known = self._corrections.setdefault(inputs, {})
        if dtype not in known:
            known[dtype] = correction_of(inputs.drift.to(dtype), factor.upper)
        return factor, corrected_target(layer.weight.to(dtype), known[dtype], options.correction)


def _report(layer: Layer, inputs: InputHessian, pool_share: float, pruned: PrunedWeight) -> LayerReport:
    own, energy = inputs.first == layer.name, pruned.energy or 0.0
    return LayerReport(
        name=layer.name,
        shape=(layer.weight.shape[0], layer.weight.shape[1]),
        zeros=pruned.zeros,
        sparsity=pruned.zeros / layer.weight.numel(),
        loss=pruned.loss,
        relative_loss=pruned.loss / energy if energy > 0 else 0.0,
        damping=pruned.damping,
        shared_with=None if own else inputs.first,
        tokens=0 if pool_share == 1 else inputs.tokens,
        pool_share=pool_share,
        seconds={"hessian": inputs.seconds() if own else 0.0, **pruned.seconds},
    )
