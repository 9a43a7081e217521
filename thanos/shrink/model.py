"""Make a causal language model smaller: fewer channels, heads, blocks and experts (docs/method.md, section 8)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thanos.pattern import IMPORTANCES, Shrink, parse_any_pattern
from thanos.report import ModelReport
from thanos.shrink.experts import expert_goal, without_experts
from thanos.shrink.job import Job
from thanos.shrink.probe import block_weights, check_samples
from thanos.walk.memory import freed_memory_kept
from thanos.walk.model import Progress


@dataclass(frozen=True)
class Shrunk:
    """A smaller model.

    Attributes:
        model: an ordinary Transformers model of the same class, which ``save_pretrained`` writes.
        report: what was done.
        became: for each axis, what was asked and what it became, in words.
    """

    model: Any
    report: ModelReport
    became: list[str]


def shrink_model(
    model: Any,
    samples: Tensor,
    pattern: Shrink | str,
    *,
    importance: str = "obs",
    multiple: int = 64,
    damping: float = 0.01,
    correction: float = 0.5,
    batch_size: int | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Shrunk:
    """Make a causal language model smaller.

    Args:
        model: any Hugging Face causal language model whose configuration can say the new shape. Its weights are
            changed: go on with the model returned.
        samples: (N, S), int64: calibration token ids.
        pattern: such as ``"channels:0.25"`` or ``"channels:0.25+heads:0.25+depth:2"``.
        importance: which channels and heads go: ``obs``, ``wanda``, ``magnitude``, ``fisher`` or ``forward``. The kept
            columns are updated by the exact solution whichever it is.
        multiple: the width of the feed-forwards becomes a multiple of it.
        damping: added to the Hessian's diagonal, relative to its mean.
        correction: from 0 to 1: how far the layers aim at the output of the dense model rather than at their own on
            the inputs that the smaller model gives them.
        batch_size: samples that go through a block together; None makes batches of about 4096 tokens.
        backend: of the operations.
        device: where blocks are worked on, one at a time; None leaves each where it is.
        progress: called before and after each layer.
        note: called with a sentence for each axis, what was asked and what it became, before the work.

    Raises:
        ValueError: the pattern is no such pattern, the model has no such parts, its configuration cannot say the new
            shape (all of that before any work), or its weights or activations hold NaN or infinity.
    """
    parsed = parse_any_pattern(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(parsed, Shrink):
        raise ValueError(f"pattern {parsed} leaves the model's shape as it is: use prune_model")
    check_shrink_options(importance, multiple, damping, correction)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), freed_memory_kept():
            check_samples(model, samples)
            experts = parsed.axis("experts")
            rest = Shrink(tuple(axis for axis in parsed.axes if axis is not experts))
            goal = expert_goal(model, experts, samples) if experts else None
            job = None
            if rest.axes:
                job = Job(model, samples, rest, importance, multiple, damping, correction, batch_size, backend, device)
            became = [*(job.became if job else []), *([goal.became(experts)] if goal and experts else [])]
            for sentence in became:
                if note is not None:
                    note(sentence)
            report = None
            if job is not None:
                report = job.run(progress)
                model, became[: len(job.became)] = job.model, job.became
            if experts is not None:
                begin, before = time.perf_counter(), block_weights(model)
                goal = expert_goal(model, experts, samples)  # blocks may have gone since
                model, gone = without_experts(model, goal, samples, importance)
                report = _with_experts(
                    report, parsed, importance, before, block_weights(model), gone, time.perf_counter() - begin
                )
            assert report is not None
            report = dataclasses.replace(report, pattern=str(parsed), options={**report.options, "became": became})
            return Shrunk(model, report, became)
    finally:
        model.train(training)


def _with_experts(
    report: ModelReport | None,
    pattern: Shrink,
    importance: str,
    before: int,
    after: int,
    gone: dict[str, list[int]],
    seconds: float,
) -> ModelReport:
    """The record of the experts that went, added to that of the other axes."""
    if report is None:
        report = ModelReport(importance, str(pattern), 0.0, 0.0, {}, [], [], {}, 1, {"other": 0.0, "total": 0.0})
    times = {**report.seconds, "experts": seconds, "total": report.seconds["total"] + seconds}
    share = 1 - (1 - report.effective_sparsity) * after / before
    options = {**report.options, "importance": importance, "removed_experts": gone}
    return dataclasses.replace(report, nominal_sparsity=share, effective_sparsity=share, options=options, seconds=times)


def check_shrink_options(importance: str, multiple: int, damping: float, correction: float) -> None:
    """Raise ValueError where the options of :func:`shrink_model` could suit no model."""
    if importance not in IMPORTANCES:
        raise ValueError(f"importance {importance!r} is none of {', '.join(IMPORTANCES)}")
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, not {multiple}")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, not {damping}")
    if not 0 <= correction <= 1:
        raise ValueError(f"correction must be from 0 to 1, not {correction}")
