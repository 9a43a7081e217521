"""Prune any causal language model: the checks before the walk, the walk, and its record."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from thanos.checkpoint import max_length
from thanos.engine.peers import ALONE, Peers
from thanos.options import WalkOptions
from thanos.pattern import Pattern
from thanos.report import ModelReport
from thanos.walk.allocation import allocate_first, settled
from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder, Layer, find_decoder
from thanos.walk.events import Progress
from thanos.walk.finite import check_finite
from thanos.walk.memory import freed_memory_kept, freed_memory_returned
from thanos.walk.plan import copied, make_plan, work_device
from thanos.walk.replay import NoChainError, watch_blocks
from thanos.walk.resume import Keeper
from thanos.walk.search import Judge
from thanos.walk.store import Stores, in_memory
from thanos.walk.walk import State, Walk
from thanos.walk.zeros import count_zeros
from thanos_kernels.dispatch import check as check_backend
from thanos_kernels.errors import first_line

_UNUSED = "no calibration token reached it"
_BYPASSED = "its weight is used without calling the layer, so its input is not seen"


def prune_model(
    model: nn.Module,
    samples: Tensor,
    pattern: Pattern | str | float,
    *,
    progress: Callable[[Progress], None] | None = None,
    keeper: Keeper | None = None,
    stores: Stores = in_memory,
    peers: Peers = ALONE,
    **options: Any,
) -> ModelReport:
    """Prune the linear layers of a causal language model in place, one decoder block after the other.

    Every layer sees what the pruned layers before it make of the samples. Embeddings and output head stay dense.

    Args:
        model: any Hugging Face causal language model.
        samples: (N, S), int64: calibration token ids, such as :func:`thanos.load_samples` draws.
        pattern: as for :func:`thanos.prune_weight`.
        progress: called before and after each layer is pruned.
        keeper: writes down each block that is done, and goes on with a walk that was written down.
        stores: where blocks come from that are not in memory, with a ``keeper``; see :mod:`thanos.walk.store`.
        peers: processes that prune the model together; each calls this with the same arguments.
        options: by keyword, those of :class:`thanos.options.WalkOptions`: method, block_size, outlier_fraction,
            damping, metric, refine, backend, exclude, passes, batch_size, memory_limit, experts, device, targets,
            correction, reconstruct, allocation, search_evaluations.

    Raises:
        ValueError, TypeError: the model is of an unsupported kind, an option does not fit it (all layers are checked
            before any work), or its weights or activations hold NaN or infinity.
        torch.linalg.LinAlgError: a layer's Hessian is not positive definite with any damping up to 1.0.
    """
    chosen = WalkOptions.of(pattern, **options)
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"the model must be a causal language model of Transformers, not {type(model).__name__}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function to call, not {type(progress).__name__}")
    _check_device(chosen.device, chosen.backend)
    decoder = find_decoder(model)
    layers = choose_layers(decoder, chosen)
    samples = check_samples(model, samples)
    check_layers(layers, chosen, resident=stores is in_memory)
    _check_peers(layers, len(samples), chosen, peers)
    training = model.training
    model.eval()
    try:
        memory = freed_memory_kept if stores is in_memory else freed_memory_returned
        with torch.inference_mode(False), torch.no_grad(), memory():
            clock = Clock(work_device(decoder, chosen))
            if keeper is None:
                plan, hidden = make_plan(model, decoder, samples, chosen, clock, None, stores, peers)
                state = State(hidden, dense=copied(hidden) if chosen.beside else None)
            else:
                plan, state = keeper.begin(model, decoder, samples, chosen, clock, list(layers.values()), stores, peers)
            patch = keeper.patch if keeper is not None and peers.rank == 0 else None
            walk = settled(Walk(plan, chosen, frozenset(layers), clock, progress, patch, peers), state)
            if walk.options.allocation != "uniform" and state.counts_wanted is None:
                judge = _judge(model, samples, keeper)
                state.counts_wanted = allocate_first(walk, state.hidden, judge, decoder, stores)
                if state.dense is not None:
                    state.dense = copied(state.hidden)
            while state.block < len(plan.store):
                walk.prune_block(state)
                if keeper is not None:
                    keeper.keep(state, plan, clock)
            if keeper is not None:
                keeper.finish()
    except BaseException:
        if keeper is not None:
            with suppress(Exception):
                keeper.finish()
        raise
    finally:
        model.train(training)
    return _record(walk, state, decoder, stores)


def pruned_parameters(model: nn.Module, report: ModelReport) -> set[str]:
    """Names of the parameters that a run changed."""
    pruned = {layer.name for layer in report.layers}
    layers = (layer for block in find_decoder(model).layers for layer in block)
    names = {layer.parameter_name for layer in layers if layer.name in pruned}
    return names.union(*(block.parameters for block in report.blocks))


def _check_device(device: str | torch.device | None, backend: str) -> None:
    """Raise ValueError where nothing can be worked on a device, or not by the backend that was asked for."""
    device = torch.device(device or "cpu")
    if device.type == "meta":
        raise ValueError("the meta device holds no weights; choose another device")
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} cannot be used here: {first_line(error)}") from None
    one = torch.zeros(1, 1, dtype=torch.float32, device=device)
    try:
        check_backend("accumulate_hessian", backend, one, one)
    except (RuntimeError, TypeError) as error:
        raise ValueError(first_line(error)) from None


def check_model(model: nn.Module, options: WalkOptions) -> None:
    """Refuse what shows in the modules and their shapes; the model may lie on the meta device.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: as :func:`prune_model`, as far as it depends on no weight and no sample.
    """
    _check_device(options.device, options.backend)
    decoder = find_decoder(model)
    _check_shapes(choose_layers(decoder, options), options)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad():
            watch_blocks(model, decoder.blocks, tokens)
    except NoChainError:
        raise
    except Exception:  # of a forward that needs real numbers: it is watched once they are there
        return


def choose_layers(decoder: Decoder, options: WalkOptions) -> dict[str, Layer]:
    """The layers to prune by name; ValueError where ``exclude`` leaves none."""
    excluded = re.compile(options.exclude) if options.exclude else None
    layers = [layer for block in decoder.layers for layer in block]
    chosen = {layer.name: layer for layer in layers if not (excluded and excluded.search(layer.name))}
    if not chosen:
        raise ValueError(f"exclude {options.exclude!r} leaves no layer to prune, for instance not {layers[0].name}")
    return chosen


def check_samples(model: nn.Module, samples: Any) -> Tensor:
    """The token ids (N, S) on the CPU, refused where the model does not take them."""
    if not isinstance(samples, Tensor):
        try:
            if isinstance(samples, list | tuple) and samples and all(isinstance(one, Tensor) for one in samples):
                samples = torch.stack(tuple(samples))
            else:
                samples = torch.tensor(samples, dtype=None, device="cpu")  # the samples' own, checked below
        except (TypeError, ValueError, RuntimeError):
            kind = type(samples).__name__ + (" of others" if isinstance(samples, list | tuple) else "")
            raise TypeError(
                f"samples must be an (N, S) tensor of token ids, or lists of them of one length, not {kind}"
            ) from None
    if samples.is_meta or samples.layout != torch.strided:
        kind = "the meta device" if samples.is_meta else f"the layout {samples.layout}"
        raise ValueError(f"samples are on {kind}, which holds no list of token ids; make them an ordinary tensor")
    if samples.dim() != 2 or samples.numel() == 0 or samples.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"samples must be a non-empty (N, S) matrix of token ids, not {samples.dtype} {tuple(samples.shape)}"
        )
    limit = max_length(model.config)
    if limit is not None and samples.shape[1] > limit:
        raise ValueError(f"samples of {samples.shape[1]} tokens are longer than the {limit} that the model takes")
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"samples hold token {low if low < 0 else high}; the model's vocabulary has {vocabulary}")
    return samples


def check_layers(layers: dict[str, Layer], options: WalkOptions, resident: bool = True) -> None:
    """Raise ValueError, naming the layer, where one cannot be pruned so, is not loaded, or holds NaN or infinity."""
    _check_shapes(layers, options)
    for name, layer in layers.items():
        if resident and layer.weight.is_meta:
            raise ValueError(f"{name}: its weights are not loaded")
    if resident:
        check_finite(layers.values())


def _judge(model: nn.Module, samples: Tensor, keeper: Keeper | None) -> Judge:
    """What a search for an allocation is judged by, and where an earlier one is found."""
    return Judge(model, samples) if keeper is None else Judge(model, samples, keeper.searched(), keeper.keep_search)


def _check_peers(layers: dict[str, Layer], samples: int, options: WalkOptions, peers: Peers) -> None:
    """Raise ValueError where there is not something to do for every process."""
    if samples < peers.size:
        raise ValueError(f"{samples} samples cannot be shared out among {peers.size} processes; start fewer")
    for name, layer in layers.items():
        rows = layer.weight.shape[0] - options.outliers(layer.weight.shape[0])
        if rows < peers.size and layer.experts is None:
            raise ValueError(f"{name}: {rows} rows cannot be shared out among {peers.size} processes; start fewer")


def _check_shapes(layers: dict[str, Layer], options: WalkOptions) -> None:
    for name, layer in layers.items():
        try:
            options.check_layer(*layer.weight.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _record(walk: Walk, state: State, decoder: Decoder, stores: Stores) -> ModelReport:
    """The record of the finished walk."""
    plan, options = walk.plan, walk.options
    layers = [layer for block in decoder.layers for layer in block]
    skipped = {name: left for block in decoder.skipped for name, left in block.items()}
    running = {layer.name for block in plan.decoder.layers for layer in block}
    counts = list(state.counts)
    for block, inside in zip(decoder.blocks, decoder.layers, strict=True):
        if not any(block is other for other in plan.decoder.blocks):
            one = stores([block], plan.device)
            counts.append(count_zeros(one.load(0, torch.device("cpu")), inside, {}))
            one.store(0)
    return ModelReport(
        method=options.method,
        pattern=str(options.pattern),
        nominal_sparsity=options.pattern.sparsity,
        effective_sparsity=sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts),
        options={**options.record(), "device": str(plan.device)},
        layers=list(state.reports.values()),
        excluded=[layer.name for layer in layers if layer.name not in walk.chosen],
        dense={name: left.reason for name, left in skipped.items()}
        | {
            layer.name: (_BYPASSED if layer.name in plan.bypassed else _UNUSED)
            if layer.name in running
            else "its block does not run"
            for layer in layers
            if layer.name in walk.chosen and layer.name not in state.reports
        },
        passes=plan.passes,
        blocks=state.blocks,
        seconds={part: seconds + state.seconds.get(part, 0.0) for part, seconds in walk.clock.stop().items()},
    )
