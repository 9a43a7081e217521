"""Walk any causal language model block by block and prune its linear layers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.checkpoint import max_length
from thanos.engine.layer import PrunedWeight, check_options, check_pattern, prune_weight
from thanos.pattern import Pattern, parse_pattern
from thanos.report import LayerReport, ModelReport
from thanos.walk.clock import Clock
from thanos.walk.decoder import Decoder, Layer, find_decoder
from thanos.walk.hessians import Collector, InputHessian
from thanos.walk.memory import freed_memory_kept
from thanos.walk.plan import Batch, Plan, make_plan


@dataclass(frozen=True)
class Progress:
    """Where the walk is.

    Attributes:
        block, blocks: the block at hand, from 0, of how many.
        layer: the name of the layer at hand.
        done, layers: how many layers are pruned, of how many.
        relative_loss: of the layer at hand; None while it is still being worked on.
        seconds: since the walk began.
    """

    block: int
    blocks: int
    layer: str
    done: int
    layers: int
    relative_loss: float | None
    seconds: float


@dataclass(frozen=True)
class Options:
    """How each layer is pruned: the arguments of :func:`thanos.prune_weight`."""

    pattern: Pattern
    method: str
    block_size: int | None
    outlier_fraction: float
    damping: float
    metric: str | None
    backend: str

    def prune(self, layer: Layer, inputs: InputHessian) -> PrunedWeight:
        return prune_weight(
            layer.weight,
            inputs.factor(self.damping, self.backend),
            self.pattern,
            method=self.method,
            block_size=self.block_size,
            outlier_fraction=self.outlier_fraction,
            damping=self.damping,
            metric=self.metric,
            backend=self.backend,
        )


def prune_model(
    model: nn.Module,
    samples: Tensor,
    pattern: Pattern | str,
    *,
    method: str = "thanos",
    block_size: int | None = None,
    outlier_fraction: float = 0.0,
    damping: float = 0.01,
    metric: str | None = None,
    exclude: str | None = None,
    passes: int | None = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> ModelReport:
    """Prune the linear layers of a causal language model in place, one decoder block after the other.

    Every layer sees what the pruned layers before it make of the samples. Embeddings and output head stay dense.

    Args:
        model: any Hugging Face causal language model.
        samples: (N, S), int64: calibration token ids, such as :func:`thanos.text.samples.load_samples` draws.
        pattern, method, block_size, outlier_fraction, damping, metric, backend: as for :func:`thanos.prune_weight`.
        exclude: a regular expression; layers in whose full name it is found stay dense.
        passes: 1 runs all samples through a block together and prunes each layer right before it runs; 2 runs every
            block twice, in batches. None takes one pass where the activations of a block fit ``memory_limit``.
        batch_size: samples in a batch of the two-pass walk; None makes batches of about 4096 tokens.
        memory_limit: bytes for activations; None is half of what is free on the device.
        device: where blocks are worked on, one at a time; None leaves each where it is.
        progress: called before and after each layer is pruned.

    Raises:
        ValueError: the model is of an unsupported kind, an option does not fit it (all layers are checked before any
            work), or its weights or activations hold NaN or infinity.
        torch.linalg.LinAlgError: a layer's Hessian is not positive definite with any damping up to 1.0.
    """
    parsed = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    check_options(parsed, method, block_size, outlier_fraction, damping, metric)
    options = Options(parsed, method, block_size, outlier_fraction, damping, metric, backend)
    decoder = find_decoder(model)
    chosen = _choose(decoder, exclude)
    _check_samples(model, samples)
    _check_walk(passes, batch_size)
    _check_layers(chosen, options)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), freed_memory_kept():
            walk = _Walk(options, chosen, progress)
            plan = make_plan(model, decoder, samples, passes, batch_size, memory_limit, device, walk.clock)
            walk.run(plan)
    finally:
        model.train(training)
    return walk.report(
        decoder,
        plan,
        {
            "block_size": block_size,
            "outlier_fraction": outlier_fraction,
            "damping": damping,
            "metric": metric,
            "exclude": exclude,
            "batch_size": batch_size,
            "backend": backend,
            "device": str(plan.device),
        },
    )


def _choose(decoder: Decoder, exclude: str | None) -> dict[str, Layer]:
    try:
        pattern = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ValueError(f"exclude is no regular expression: {error} in {exclude!r}") from None
    layers = [layer for block in decoder.layers for layer in block]
    chosen = {layer.name: layer for layer in layers if not (pattern and pattern.search(layer.name))}
    if not chosen:
        raise ValueError(f"exclude {exclude!r} leaves no layer to prune, for instance not {layers[0].name}")
    return chosen


def _check_samples(model: nn.Module, samples: Tensor) -> None:
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


def _check_walk(passes: int | None, batch_size: int | None) -> None:
    if passes not in (None, 1, 2):
        raise ValueError(f"passes must be 1 or 2, not {passes}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch size must be at least 1, not {batch_size}")


def _check_layers(layers: dict[str, Layer], options: Options) -> None:
    for name, layer in layers.items():
        weight = layer.weight
        rows, columns = weight.shape
        try:
            check_pattern(options.pattern, rows, columns, options.outlier_fraction)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if weight.is_meta:
            raise ValueError(f"{name}: its weights are not loaded")
        low, high = weight.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise ValueError(f"{name}: its weights hold NaN or infinity")


class _Walk:
    """Prunes the blocks one after the other and keeps the record."""

    def __init__(self, options: Options, chosen: dict[str, Layer], progress: Callable[[Progress], None] | None) -> None:
        self.clock = Clock()
        self._options = options
        self._chosen = chosen
        self._progress = progress
        self._blocks = 0
        self._block = 0
        self._reports: dict[str, LayerReport] = {}
        self._removed = 0

    def run(self, plan: Plan) -> None:
        """Both walks end a block with its batches' hidden states replaced by what the pruned block makes of them."""
        self._blocks = len(plan.store)
        for index, layers in enumerate(plan.decoder.layers):
            self._block = index
            block = plan.store.load(index, plan.device)
            collector = Collector(self._options.backend)
            chosen = [layer for layer in layers if layer.name in self._chosen]
            if plan.passes == 1:
                with collector.watching(chosen, partial(self._before_layer, collector)):
                    self._forward(block, index, plan.batches)
            else:
                with collector.watching(chosen, partial(self._collect, collector)):
                    self._forward(block, index, plan.batches, keep=False)
                for layer in chosen:
                    self._prune(collector, layer)
                self._forward(block, index, plan.batches)
            plan.store.store(index)
        plan.batches.clear()

    def _forward(self, block: nn.Module, index: int, batches: list[Batch], *, keep: bool = True) -> None:
        with self.clock("forward"):
            for batch in batches:
                hidden = batch.calls[index](block, batch.hidden)
                if keep:
                    batch.hidden = hidden

    def _collect(self, collector: Collector, layer: Layer, inputs: Tensor) -> None:
        with self.clock("hessian"):
            collector.add(layer, inputs)

    def _before_layer(self, collector: Collector, layer: Layer, inputs: Tensor) -> None:
        """One pass: all of a layer's input is here, so it is pruned before it runs."""
        if layer.name not in self._reports:
            self._collect(collector, layer, inputs)
            self._prune(collector, layer)

    def _prune(self, collector: Collector, layer: Layer) -> None:
        inputs = collector.take(layer.name)
        if inputs is None:
            return
        with self.clock("other"):
            self._tell(layer.name, None)
        with self.clock("prune"):
            weight = layer.weight
            try:
                energy = kernels.row_energy(
                    weight.to(inputs.hessian.dtype), inputs.hessian, backend=self._options.backend
                )
                pruned = self._options.prune(layer, inputs)
            except (ValueError, torch.linalg.LinAlgError) as error:
                raise type(error)(f"{layer.name}: {error}") from error
            weight.copy_(pruned.weight)
            removed = int(pruned.mask.sum())
        self._removed += removed
        report = self._layer_report(layer, inputs, pruned, removed / weight.numel(), float(energy.double().sum()))
        self._reports[layer.name] = report
        with self.clock("other"):
            self._tell(layer.name, report.relative_loss)

    def _layer_report(
        self, layer: Layer, inputs: InputHessian, pruned: PrunedWeight, sparsity: float, energy: float
    ) -> LayerReport:
        own = inputs.first == layer.name
        return LayerReport(
            name=layer.name,
            shape=(layer.weight.shape[0], layer.weight.shape[1]),
            sparsity=sparsity,
            loss=pruned.loss,
            relative_loss=pruned.loss / energy if energy > 0 else 0.0,
            damping=pruned.damping,
            shared_with=None if own else inputs.first,
            tokens=inputs.tokens,
            seconds={"hessian": inputs.seconds if own else 0.0, **pruned.seconds},
        )

    def _tell(self, layer: str, relative_loss: float | None) -> None:
        if self._progress is not None:
            seconds = time.perf_counter() - self.clock.begin
            self._progress(
                Progress(
                    self._block, self._blocks, layer, len(self._reports), len(self._chosen), relative_loss, seconds
                )
            )

    def report(self, decoder: Decoder, plan: Plan, options: dict[str, Any]) -> ModelReport:
        """The record of the finished walk."""
        layers = [layer for block in decoder.layers for layer in block]
        running = {layer.name for block in plan.decoder.layers for layer in block}
        dense = {
            name: "no calibration token reached it" if name in running else "its block does not run"
            for name in self._chosen
            if name not in self._reports
        }
        return ModelReport(
            method=self._options.method,
            pattern=str(self._options.pattern),
            nominal_sparsity=self._options.pattern.sparsity,
            effective_sparsity=self._removed / sum(layer.weight.numel() for layer in layers),
            options=options,
            layers=list(self._reports.values()),
            excluded=[layer.name for layer in layers if layer.name not in self._chosen],
            dense=dense,
            passes=plan.passes,
            seconds=self.clock.stop(),
        )
