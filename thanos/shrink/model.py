"""Make a causal language model smaller: fewer channels, heads, blocks and experts (docs/method.md, section 8)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos.pattern import Axis, Shrink, parse_any_pattern
from thanos.report import ModelReport
from thanos.shrink.compensate import compensate
from thanos.shrink.experts import expert_goal, without_experts
from thanos.shrink.guided import DepthSets, check_depth_sets, find_depth_sets, follow_input
from thanos.shrink.job import Job
from thanos.shrink.options import ShrinkOptions
from thanos.shrink.probe import block_weights, check_samples
from thanos.walk.decoder import find_decoder
from thanos.walk.events import Progress
from thanos.walk.memory import freed_memory_kept


@dataclass(frozen=True)
class Shrunk:
    """A smaller model.

    Attributes:
        model: an ordinary Transformers model of the same class, which ``save_pretrained`` writes.
        report: what was done.
        became: for each axis, what was asked and what it became, in words.
        sets: with ``depth:6@4`` the model is whole, and passes over these; write them beside it.
    """

    model: Any
    report: ModelReport
    became: list[str]
    sets: DepthSets | None = None


def shrink_model(
    model: Any,
    samples: Tensor,
    pattern: Shrink | str,
    *,
    importance: str = "obs",
    multiple: int = 64,
    damping: float = 0.01,
    correction: float = 0.0,
    reconstruct: int = 0,
    batch_size: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Shrunk:
    """Make a causal language model smaller.

    Args:
        model: any Hugging Face causal language model whose configuration can say the new shape. Its weights are
            changed: go on with the model returned.
        samples: (N, S), int64: calibration token ids.
        pattern: such as ``"channels:0.25"`` or ``"channels:0.25+heads:0.25+depth:2"``.
        importance: which channels and heads go: ``obs``, ``wanda``, ``magnitude``, ``fisher`` or ``forward``. The kept
            columns are updated by the exact solution whichever it is. Experts go by REAP's score (``obs``), or by the
            mean norm of their outputs (``forward``); blocks by how far the model's output moves without them.
        multiple: the width of the feed-forwards becomes a multiple of it.
        damping: added to the Hessian's diagonal, relative to its mean.
        correction: from 0 to 1: how far the layers aim at the output of the dense model rather than at their own on
            the inputs that the smaller model gives them.
        reconstruct: epochs over the samples in which what stays of each block with fewer channels or heads is trained
            to give the dense model's output of the block.
        batch_size: samples that go through a block together; None makes batches of about 4096 tokens.
        backend: of the operations.
        device: where blocks are worked on, one at a time; None leaves each where it is.
        progress: called before and after each layer.

    Raises:
        ValueError: the pattern is no such pattern, the model has no such parts, its configuration cannot say the new
            shape (all of that before any work), or its weights or activations hold NaN or infinity.
    """
    return ShrinkPlan(
        model,
        samples,
        pattern,
        importance=importance,
        multiple=multiple,
        damping=damping,
        correction=correction,
        reconstruct=reconstruct,
        batch_size=batch_size,
        backend=backend,
        device=device,
    ).run(progress)


class ShrinkPlan:
    """What :func:`shrink_model` will do, checked and not yet done.

    Args:
        model, samples, pattern: as there.
        options: the other arguments there, by name. Errors as there.

    Attributes:
        became: for each axis, what was asked and what it becomes, in words.
    """

    def __init__(self, model: Any, samples: Tensor, pattern: Shrink | str, **options: Any) -> None:
        parsed = parse_any_pattern(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(parsed, Shrink):
            raise ValueError(f"pattern {parsed} leaves the model's shape as it is: use prune_model")
        self._options = ShrinkOptions(**options)
        self._options.check(parsed)
        check_samples(model, samples)
        self._model, self._samples, self._pattern = model, samples, parsed
        self._guided = next((axis for axis in parsed.axes if axis.sets), None)
        self._experts = parsed.axis("experts")
        rest = Shrink(tuple(axis for axis in parsed.axes if axis not in (self._experts, self._guided)))
        self._job: Job | None = None
        self.became: list[str] = []
        with self._working():
            if rest.axes:
                self._job = Job(model, samples, rest, self._options)
                self.became += self._job.became
            if self._experts is not None:
                self.became.append(expert_goal(model, self._experts, samples).became(self._experts))
            if self._guided is not None:
                self.became.append(check_depth_sets(model, samples, self._guided))

    @contextmanager
    def _working(self) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode(False), torch.no_grad(), freed_memory_kept():
                yield
        finally:
            self._model.train(training)

    def run(self, progress: Callable[[Progress], None] | None = None) -> Shrunk:
        """Do it, once."""
        with self._working():
            if self._guided is not None:
                return self._guide(self._guided, progress)
            report = None
            if self._job is not None:
                report = self._job.run(progress)
                self._model = self._job.model
                self.became[: len(self._job.became)] = self._job.became
            if self._experts is not None:
                report = self._remove_experts(self._experts, report)
            assert report is not None
            options = {**report.options, "became": self.became}
            return Shrunk(
                self._model, dataclasses.replace(report, pattern=str(self._pattern), options=options), self.became
            )

    def _remove_experts(self, axis: Axis, report: ModelReport | None) -> ModelReport:
        begin, before = time.perf_counter(), block_weights(self._model)
        goal = expert_goal(self._model, axis, self._samples)  # blocks may have been removed since it was first checked
        dense = self._model
        self._model, removed = without_experts(dense, goal, self._samples, self._options.importance)
        names = [mixture.name for mixture in goal.mixtures]
        adjusted = compensate(dense, self._model, names, self._samples, self._options.device)
        seconds = time.perf_counter() - begin
        report = report or _empty_report(self._options.importance)
        share = 1 - (1 - report.effective_sparsity) * block_weights(self._model) / before
        return dataclasses.replace(
            report,
            nominal_sparsity=share,
            effective_sparsity=share,
            options={
                **report.options,
                "importance": self._options.importance,
                "removed_experts": removed,
                "compensated_experts": {one.name: [one.before, one.after] for one in adjusted},
            },
            seconds={**report.seconds, "experts": seconds, "total": report.seconds["total"] + seconds},
        )

    def _guide(self, axis: Axis, progress: Callable[[Progress], None] | None) -> Shrunk:
        begin = time.perf_counter()

        def tell(done: int, total: int) -> None:
            if progress is not None:
                seconds = time.perf_counter() - begin
                progress(Progress(0, 1, "sets of blocks", done, total, None, seconds))

        sets = find_depth_sets(self._model, self._samples, axis, tell=tell)
        share = len(sets.removed[0]) / len(find_decoder(self._model).blocks)
        seconds = time.perf_counter() - begin
        report = dataclasses.replace(
            _empty_report("kl"),
            pattern=str(self._pattern),
            nominal_sparsity=share,
            effective_sparsity=share,
            options={"became": self.became, "sets": sets.removed, "samples_of_sets": sets.samples},
            seconds={"other": seconds, "total": seconds},
        )
        return Shrunk(follow_input(self._model, sets), report, self.became, sets)


def _empty_report(method: str) -> ModelReport:
    return ModelReport(method, "", 0.0, 0.0, {}, [], [], {}, 1, {"other": 0.0, "total": 0.0})
