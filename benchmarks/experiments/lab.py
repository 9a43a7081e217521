"""Where runs are carried out: the dense model, the texts, and what can be measured of a pruned model."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.engines import pruned_share
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.machine import describe
from benchmarks.records import Row
from benchmarks.smollm2 import NAME, load_smollm2
from thanos import prune_model, shrink_model
from thanos.checkpoint import DTYPES
from thanos.options import WalkOptions
from thanos.pattern import Shrink, parse_any_pattern
from thanos.scoring.perplexity import load_tokens, perplexity
from thanos.text import load_packed, load_samples

WINDOW = 1024
MULTIPLE = 16  # of the widths of smaller models


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
        files = {"calibration": self.calibration, "evaluation": self.evaluation}
        return {
            "model": NAME,
            "dtype": self.dtype,
            **{key: path.name for key, path in files.items()},
            **{f"{key}_sha256": hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()},
            "evaluation_tokens": self.windows * WINDOW,
            "window": WINDOW,
            "zero_shot_limit": self.limit,
        }


class Lab:
    """Holds the dense model and the texts."""

    def __init__(self, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        self.settings = settings
        self.model, self.tokenizer = load_smollm2(DTYPES[settings.dtype])
        self.text = load_tokens(settings.evaluation, self.tokenizer)

    def samples(self, run: Run) -> torch.Tensor:
        """The run's calibration samples, (N, S)."""
        if run.source == "wikitext2":
            unscored = self.text[max(len(self.text) // 2, self.settings.windows * WINDOW) :]
            windows = unscored[: len(unscored) // run.length * run.length].view(-1, run.length)
            chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(run.seed))
            return windows[chosen[: run.samples]]
        source: Any = {"c4": self.settings.calibration}.get(run.source, run.source)
        if run.source == TRAINING:
            source = self.documents()[0]
        return load_samples(source, self.tokenizer, run.samples, run.length, run.seed).tokens

    def held_out(self) -> torch.Tensor:
        """The tokens of the last eighth of the C4 text's documents."""
        text = "\n\n".join(self.documents()[1])
        return self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]

    def training(self, length: int) -> torch.Tensor:
        """All of the C4 text but its last eighth, in windows (N, length)."""
        return load_packed(self.documents()[0], self.tokenizer, length).tokens

    def documents(self) -> tuple[list[str], list[str]]:
        """Of the C4 text: the first seven eighths, and those held out."""
        documents = [json.loads(line)["text"] for line in self.settings.calibration.read_text().splitlines()]
        first = len(documents) * 7 // 8
        return documents[:first], documents[first:]

    def prune(self, run: Run) -> tuple[Any, Row]:
        """A pruned copy of the model, and what a record says of it."""
        if run.method == "dense":
            return self.model, {"nominal_sparsity": 0.0, "effective_sparsity": 0.0}
        model = copy.deepcopy(self.model)
        if run.engine == "llmcompressor":
            return self._by_peer(model, run)
        pattern = parse_any_pattern(str(run.pattern))
        if isinstance(pattern, Shrink):
            return self._shrink(model, pattern, run)
        report = prune_model(model, self.samples(run), str(run.pattern), **run.options())
        seconds = {part: round(value, 3) for part, value in report.seconds.items()}
        sparsities = {"nominal_sparsity": report.nominal_sparsity, "effective_sparsity": report.effective_sparsity}
        return model, {**sparsities, "seconds": seconds}

    def _by_peer(self, model: Any, run: Run) -> tuple[Any, Row]:
        """The same samples, pattern and layers, pruned by llm-compressor."""
        prune, samples = peers.llmcompressor(), self.samples(run)
        begin = time.perf_counter()
        prune(model, self.tokenizer, samples, run.method, str(run.pattern))
        seconds = {"total": round(time.perf_counter() - begin, 3)}
        share = pruned_share(self.model, model, run.engine)
        return model, {"nominal_sparsity": share, "effective_sparsity": share, "seconds": seconds}

    def _shrink(self, model: Any, pattern: Shrink, run: Run) -> tuple[Any, Row]:
        """A smaller model, as the command makes it; of a preset, what there is of it where nothing is masked."""
        preset = WalkOptions.of(0.5, quality=run.quality)
        correction = preset.correction if preset.targets == "corrected" else 0.0
        shrunk = shrink_model(
            model,
            self.samples(run),
            pattern,
            multiple=MULTIPLE,
            correction=correction,
            reconstruct=preset.reconstruct,
        )
        seconds = {part: round(value, 3) for part, value in shrunk.report.seconds.items()}
        removed = shrunk.report.options.get("removed_blocks")
        more = {"removed_blocks": removed} if removed else {}
        sparsity = round(shrunk.report.effective_sparsity, 5)
        return shrunk.model, {"effective_sparsity": sparsity, "seconds": seconds, "became": shrunk.became, **more}

    def perplexity(self, model: Any) -> float | None:
        """On the scored text; None where it is not finite."""
        score = perplexity(model, self.tokenizer, self.text, sequence_length=WINDOW, windows=self.settings.windows)
        return score if math.isfinite(score) else None

    def perplexities(self, model: Any) -> Row:
        """On the scored text, and on the last eighth of the calibration text; None where it is not finite."""
        windows = self.settings.windows
        held = perplexity(model, self.tokenizer, self.held_out(), sequence_length=WINDOW, windows=windows)
        return {"perplexity": self.perplexity(model), "held_out": held if math.isfinite(held) else None}

    def zero_shot(self, model: Any) -> Row:
        from thanos.scoring.zeroshot import zero_shot

        return zero_shot(model, self.tokenizer, data=self.settings.tasks, limit=self.settings.limit).to_dict()


def scored(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """The one record of a pruned model: sparsities, seconds, perplexity, and accuracy where it is asked for."""
    model, fields = lab.prune(run)
    accuracy = {"zero_shot": lab.zero_shot(model)} if zero_shot else {}
    return [{**fields, "perplexity": lab.perplexity(model), **accuracy}]


def scored_twice(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """The usual record, with the perplexity on the held-out part of the calibration text too."""
    model, fields = lab.prune(run)
    return [{**fields, **lab.perplexities(model)}]


_lab: Lab


def start_worker(settings: Settings, threads: int) -> None:
    """Make this process's lab."""
    global _lab
    _lab = Lab(settings, threads)


def work(measure: Callable[[Lab, Run, bool], list[Row]], run: Run, zero_shot: bool) -> list[Row]:
    """A run's records, measured in this process's lab."""
    return [{"run": run.told(), **fields, "machine": describe()} for fields in measure(_lab, run, zero_shot)]
