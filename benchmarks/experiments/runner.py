"""One run of an experiment: prune the model, score it, and say where the time went."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.grid import Run
from benchmarks.experiments.rows import outlier_layers
from benchmarks.smollm2 import NAME, load_smollm2
from thanos import prune_model
from thanos.checkpoint import DTYPES
from thanos.doctor import machine
from thanos.evaluate import load_tokens, perplexity
from thanos.report import versions
from thanos.text import load_samples

WINDOW = 1024


@dataclass(frozen=True)
class Settings:
    """What is the same in every run of an experiment.

    Attributes:
        dtype: of the model, by name.
        calibration, evaluation: text files. Of the latter the first ``windows`` windows of 1024 tokens are scored; its
            second half, as far as it is not scored, serves as the calibration source ``wikitext2``.
        tasks: a folder with lm-eval's tasks as JSONL.
        limit: documents of each task.
    """

    dtype: str
    calibration: Path
    evaluation: Path
    windows: int
    tasks: Path
    limit: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, files by name and hash."""
        return {
            "model": NAME,
            "dtype": self.dtype,
            "calibration": self.calibration.name,
            "calibration_sha256": _sha256(self.calibration),
            "evaluation": self.evaluation.name,
            "evaluation_sha256": _sha256(self.evaluation),
            "evaluation_tokens": self.windows * WINDOW,
            "window": WINDOW,
            "zero_shot_limit": self.limit,
        }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Runner:
    """Holds the dense model and the texts, and carries out runs."""

    def __init__(self, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        self.settings = settings
        self.model, self.tokenizer = load_smollm2(DTYPES[settings.dtype])
        self.text = load_tokens(settings.evaluation, self.tokenizer)

    def row(self, run: Run, experiment: str, zero_shot: bool) -> dict[str, Any]:
        """The run's entry in an experiment's results."""
        found: dict[str, Any] = {"run": run.to_dict(), "nominal_sparsity": 0.0, "effective_sparsity": 0.0}
        if experiment == "outliers":
            layers = outlier_layers(self.model, self._samples(run), str(run.pattern), run.alpha)
            return {**found, "layers": layers, "environment": environment()}
        model, seconds = self.model, None
        if run.method != "dense":
            model = copy.deepcopy(self.model)
            report = prune_model(
                model,
                self._samples(run),
                str(run.pattern),
                method=run.method,
                block_size=run.block_size,
                outlier_fraction=run.alpha,
                metric=run.metric,
                exclude=run.exclude,
            )
            found |= {"nominal_sparsity": report.nominal_sparsity, "effective_sparsity": report.effective_sparsity}
            seconds = {part: round(value, 3) for part, value in report.seconds.items()}
        score = perplexity(model, self.tokenizer, self.text, sequence_length=WINDOW, windows=self.settings.windows)
        return {
            **found,
            "perplexity": score if math.isfinite(score) else None,
            "seconds": seconds,
            "zero_shot": self._zero_shot(model) if zero_shot else None,
            "environment": environment(),
        }

    def _samples(self, run: Run) -> torch.Tensor:
        source: Any = {"c4": self.settings.calibration}.get(run.source, run.source)
        if run.source == "wikitext2":
            unscored = max(len(self.text) // 2, self.settings.windows * WINDOW)
            return _windows(self.text[unscored:], run)
        return load_samples(source, self.tokenizer, run.samples, run.length, run.seed).tokens

    def _zero_shot(self, model: Any) -> dict[str, Any]:
        from thanos.scoring.zeroshot import zero_shot

        return zero_shot(model, self.tokenizer, data=self.settings.tasks, limit=self.settings.limit).to_dict()


def _windows(tokens: torch.Tensor, run: Run) -> torch.Tensor:
    """A random choice of the windows of the tokens (T,) that do not overlap."""
    windows = tokens[: len(tokens) // run.length * run.length].view(-1, run.length)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(run.seed))
    return windows[chosen[: run.samples]]


def environment() -> dict[str, Any]:
    """The machine, its threads and the versions."""
    known = versions()
    return {
        "processor": machine()["cpu"],
        "threads": torch.get_num_threads(),
        **{name: known[name] for name in ("python", "torch", "transformers", "thanos-pruning")},
    }


_runner: Runner


def start_worker(settings: Settings, threads: int) -> None:
    """Make this process's runner."""
    global _runner
    _runner = Runner(settings, threads)


def work(run: Run, experiment: str, zero_shot: bool) -> dict[str, Any]:
    """:meth:`Runner.row` of this process's runner."""
    return _runner.row(run, experiment, zero_shot)
