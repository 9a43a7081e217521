"""How many weights each layer loses, decided on the dense model before the walk (docs/method.md, section 11)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from thanos.allocate import Curve, curvature, lamp, layer_curve, outlier_share, owl
from thanos.engine.layer import factor_for, prune_layer
from thanos.engine.peers import ALONE
from thanos.engine.timing import StepTimer
from thanos.options import AUTO
from thanos.pattern import Unstructured
from thanos.walk.decoder import Decoder, Layer
from thanos.walk.hessians import InputHessian
from thanos.walk.plan import copied, make_plan
from thanos.walk.search import Judge, no_room, search
from thanos.walk.spool import Hidden, SpooledHidden
from thanos.walk.store import Stores
from thanos.walk.walk import BlockWork, State, Walk, expert_groups

Found = TypeVar("Found")


def settled(walk: Walk, state: State) -> Walk:
    """The walk with the allocation ``auto`` decided, for all processes alike; once blocks are done, as it was begun."""
    if walk.options.allocation != AUTO:
        return walk
    searched = state.counts_wanted is not None
    if not state.block and not searched:
        searched = walk.peers.object(walk.options.shares_differ and not no_room(walk))
    return replace(walk, options=replace(walk.options, allocation="search" if searched else "uniform"))


def allocate_first(walk: Walk, hidden: Hidden, judge: Judge, decoder: Decoder, stores: Stores) -> dict[str, int]:
    """As :func:`allocate`; of several processes the first decides, on the samples of all, and the others wait."""
    peers = walk.peers
    if peers.size == 1:
        return allocate(walk, hidden, judge)
    counts: dict[str, int] = {}
    if peers.rank == 0:
        folder = hidden.folder / "all" if isinstance(hidden, SpooledHidden) else None
        if folder is not None:
            folder.mkdir(exist_ok=True)
        plan, whole = make_plan(judge.model, decoder, judge.samples, walk.options, walk.clock, folder, stores)
        counts = allocate(replace(walk, plan=plan, peers=ALONE), whole, judge)
        if folder is not None:
            shutil.rmtree(folder)
    return peers.object(counts)


def allocate(walk: Walk, hidden: Hidden, judge: Judge) -> dict[str, int]:
    """The weights that each layer of the walk loses, together as many as in a uniform choice.

    Args:
        hidden: in front of the first block; not changed. The weights are those of the dense model.
        judge: for a search.
    """
    options = walk.options
    if options.allocation == "search" and (why := no_room(walk)):
        raise ValueError(why)
    assert isinstance(options.pattern, Unstructured)
    sparsity = options.pattern.sparsity
    with walk.clock("allocate"):
        if options.allocation == "lamp":
            return lamp(_weights(walk), sparsity)
        sizes, groups = {}, {}
        for index, layers in enumerate(walk.plan.decoder.layers):
            for layer in layers:
                sizes[layer.name], groups[layer.name] = layer.weight.numel(), str(index)
        if options.allocation == "owl":
            shares = _measured(walk, hidden, lambda layer, given: outlier_share(layer.weight, _norms(given)))
            return owl(shares, {name: sizes[name] for name in shares}, sparsity, groups=groups)
        if options.allocation == "search":
            return search(walk, judge, _measured(walk, hidden, lambda _, given: given), sparsity)
        curves = _measured(walk, hidden, lambda layer, given: _curve(walk, layer, given))
        return curvature(curves, {name: sizes[name] for name in curves}, sparsity)


def _norms(given: InputHessian) -> Tensor:
    assert given.hessian is not None
    return given.hessian.diagonal().clamp(min=0).sqrt()


def _curve(walk: Walk, layer: Layer, given: InputHessian) -> Curve:
    """The layer's relative loss at several sparsities, each from the same factor."""
    assert given.hessian is not None
    options, timed = replace(walk.options, refine="none", values="plain"), StepTimer(given.hessian.device)
    dtype = torch.promote_types(layer.weight.dtype, given.hessian.dtype)
    factor = factor_for(given.hessian, dtype, options)
    energy = float((layer.weight.to(dtype) @ given.hessian.to(dtype)).mul_(layer.weight).sum(dtype=torch.float64))

    def loss_at(sparsity: float) -> float:
        return prune_layer(layer.weight, factor, replace(options, pattern=Unstructured(sparsity)), timed).loss

    return layer_curve(loss_at, energy)


def _weights(walk: Walk) -> Iterator[tuple[str, Tensor]]:
    plan = walk.plan
    for index in range(len(plan.store)):
        plan.store.load(index, plan.device)
        for layer in _chosen(walk, index):
            yield layer.name, layer.weight
        plan.store.store(index)


def _chosen(walk: Walk, index: int) -> list[Layer]:
    left_out = walk.plan.bypassed
    return [
        layer for layer in walk.plan.decoder.layers[index] if layer.name in walk.chosen and layer.name not in left_out
    ]


def _measured(walk: Walk, hidden: Hidden, measure: Callable[[Layer, InputHessian], Found]) -> dict[str, Found]:
    """What ``measure`` says of each layer and its inputs in the dense model; layers without a token are left out."""
    plan, found = walk.plan, {}
    state = State(copied(hidden))
    for index in range(len(plan.store)):
        module = plan.store.load(index, plan.device)
        layers = _chosen(walk, index)
        block = BlockWork(walk, state)
        others = [layer for layer in layers if layer.experts is None]
        experts = expert_groups([layer for layer in layers if layer.experts is not None], plan.memory_limit)
        for number, group in enumerate(experts or [[]]):
            some = group if number else others + group
            last = number == len(experts or [[]]) - 1
            for batch, calls in enumerate(plan.dense_calls):
                with block.collector.watching(some, block.collect, pools=not number):
                    output = calls[index](module, state.hidden[batch])
                if last:
                    state.hidden[batch] = output.contiguous()
            for layer in some:
                given, _ = block.inputs(layer, block.collector.take(layer))
                if given is not None and given.hessian is not None:
                    found[layer.name] = measure(layer, given)
        if isinstance(state.hidden, SpooledHidden):
            state.hidden.turn()
        plan.store.store(index)
        state.block += 1
    return found
