"""Whole models from directory to directory: where the seconds go, peak memory, perplexity, beside llm-compressor.

SmolLM2-135M-Instruct by three methods, and a random model of TinyLlama-1.1B's shapes by Thanos. With the extra
``peers``, llm-compressor's SparseGPT and Wanda take the same samples, layers and dtype, and ours must be twice as fast.
Every run has a process of its own, warmed up on a small model (see benchmarks/engines.py); what pytest-benchmark times
is that process, and ``extra_info["total"]`` the run itself.

Environment variables: THANOS_BENCH_SAMPLES (32), THANOS_BENCH_LENGTH (512), THANOS_BENCH_WINDOWS (16, of 1024 tokens,
for the perplexity) and THANOS_BENCH_PATTERNS (0.5; such as 0.5,2:4).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import peers
from benchmarks.engines import BLOCK_SIZE, DAMPING, Job, Outcome, run, save_warm_model
from benchmarks.smollm2 import NAME, fast_dtype, load_smollm2
from thanos.bench_inference import random_tinyllama
from thanos.checkpoint import save_model
from thanos.evaluate import load_tokens
from thanos.pattern import parse_pattern
from thanos.text import load_samples

SAMPLES = int(os.environ.get("THANOS_BENCH_SAMPLES", "32"))
LENGTH = int(os.environ.get("THANOS_BENCH_LENGTH", "512"))
WINDOWS = int(os.environ.get("THANOS_BENCH_WINDOWS", "16"))
PATTERNS = os.environ.get("THANOS_BENCH_PATTERNS", "0.5").split(",")
WINDOW = 1024
RANDOM_SAMPLES = 8  # at most, for the random model
TIMES_FASTER = 2.0  # than llm-compressor's SparseGPT, to reach
RANDOM = "random TinyLlama-1.1B"
DATA = Path(__file__).parents[2] / "shared" / "data"


def source(name: str) -> str:
    """The path of a text of the shared data, where that is present; else the built-in one."""
    return str(DATA / name) if (DATA / name).exists() else "builtin"


@dataclass(frozen=True)
class Case:
    """A model in a directory, with all that its runs share."""

    model: str
    job: Job  # engine, method and pattern still open
    settings: dict[str, str]


@dataclass
class Runs:
    """Each run is made once and kept for the comparison."""

    cases: dict[str, Case] = field(default_factory=dict)
    outcomes: dict[tuple[str, str, str, str], Outcome] = field(default_factory=dict)
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)

    def outcome(self, case: Case, engine: str, method: str, pattern: str) -> Outcome:
        key = (case.model, engine, method, pattern)
        if key not in self.outcomes:
            self.cases[case.model] = case
            self.outcomes[key] = run(replace(case.job, engine=engine, method=method, pattern=pattern))
        return self.outcomes[key]

    def print(self) -> None:
        console = Console(width=128, highlight=False)
        parts = ("total", "input_output", "forward", "hessian", "prune", "other")
        for name, case in self.cases.items():
            headings = (*(part.replace("input_output", "in/out") for part in parts), "MB", "perplexity", "zeros")
            table = Table("engine", "method", "pattern", *headings, title=f"{name}, seconds")
            for (model, *names), found in self.outcomes.items():
                if model == name:
                    split = {"total": found.total} | (found.split if "thanos" in names[:1] else {})
                    seconds = [f"{split[part]:.1f}" if part in split else "" for part in parts]
                    score = "" if found.perplexity is None else f"{found.perplexity:.2f}"
                    table.add_row(*names, *seconds, f"{found.peak_bytes / 1e6:.0f}", score, f"{found.sparsity:.3%}")
            settings = case.settings | (peers.settings() if name == NAME and not peers.missing() else {})
            console.print(table, *(f"{key}: {text}" for key, text in settings.items()), sep="\n")
        if self.verdicts:
            table = Table("against llm-compressor's SparseGPT", "measured", "to reach")
            for row in self.verdicts:
                table.add_row(*row)
            console.print(table)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    made = Runs()
    yield made
    made.print()


def make_case(name: str, model: Any, tokenizer: Any, folder: Path, samples: Tensor, text: Tensor | None) -> Case:
    """Write the model and the small one that warms up into ``folder``."""
    save_model(model, tokenizer, folder / "model")
    save_warm_model(folder / "model", folder / "warm")
    job = Job("", "", "", folder / "model", folder / "warm", samples, text, WINDOW)
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {
        "dtype": dtype,
        "layers": "every linear layer of the decoder blocks; embeddings and head stay dense",
        "damping": f"{DAMPING:g}",
        "block size": f"{BLOCK_SIZE} for SparseGPT in both engines, the default for Thanos",
        "timed": "reading the directory, pruning and writing it; each run in a fresh process",
        "warm-up": "the same on two random blocks of the same widths and two short samples",
    }
    return Case(name, job, settings)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Removed in the end, unlike pytest's own, for the checkpoints in it are large."""
    with tempfile.TemporaryDirectory(prefix="thanos-bench-") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def smollm2(folder: Path) -> Case:
    try:
        model, tokenizer = load_smollm2(fast_dtype())
    except ValueError as error:
        pytest.skip(str(error))
    calibration, evaluation = source("c4-sample.jsonl"), source("wikitext2-test.txt")
    samples = load_samples(calibration, tokenizer, SAMPLES, LENGTH)
    text = load_tokens(evaluation, tokenizer)[: WINDOWS * WINDOW]
    case = make_case(NAME, model, tokenizer, folder / "smollm2", samples.tokens, text)
    texts = {
        "calibration": f"{Path(calibration).name}, {SAMPLES} x {LENGTH} tokens, seed {samples.seed}",
        "evaluation": f"{Path(evaluation).name}, {len(text) // WINDOW} windows of {WINDOW} tokens",
    }
    return replace(case, settings=texts | case.settings)


@pytest.fixture(scope="module")
def tinyllama(folder: Path) -> Case:
    model = random_tinyllama().to(fast_dtype())
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(model.config.vocab_size, (min(SAMPLES, RANDOM_SAMPLES), LENGTH), generator=generator)
    case = make_case(RANDOM, model, None, folder / "tinyllama", samples, None)
    return replace(case, settings={"calibration": f"random, {len(samples)} x {LENGTH} tokens"} | case.settings)


def measure(benchmark: Any, runs: Runs, case: Case, engine: str, method: str, pattern: str) -> None:
    outcome = benchmark.pedantic(runs.outcome, args=(case, engine, method, pattern), rounds=1)
    scored = 0 if case.job.text is None else len(case.job.text) // WINDOW * (WINDOW - 1)
    benchmark.extra_info |= {
        "kind": "model",
        "model": case.model,
        "engine": engine,
        "method": method,
        "pattern": pattern,
        "samples": len(case.job.samples),
        "length": LENGTH,
        "dtype": case.settings["dtype"],
        "split": outcome.split if engine == "thanos" else {},
        "total": outcome.total,
        "peak_bytes": outcome.peak_bytes,
        "perplexity": outcome.perplexity,
        "perplexity_tokens": scored,
        "settings": {
            **case.settings,
            "threads": str(outcome.threads),
            "effective sparsity": f"{outcome.sparsity:.6f}",
            **(peers.settings() if engine == "llmcompressor" else {}),
        },
    }
    nominal = parse_pattern(pattern).sparsity
    assert abs(outcome.sparsity - nominal) < 1e-3, f"{engine} pruned {outcome.sparsity:.2%} instead of {nominal:.2%}"


needs_peer = pytest.mark.skipif(bool(peers.missing()), reason=peers.missing())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda"])
def test_smollm2(benchmark: Any, runs: Runs, smollm2: Case, method: str, pattern: str) -> None:
    measure(benchmark, runs, smollm2, "thanos", method, pattern)


@needs_peer
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_smollm2_by_llmcompressor(benchmark: Any, runs: Runs, smollm2: Case, method: str, pattern: str) -> None:
    measure(benchmark, runs, smollm2, "llmcompressor", method, pattern)


@needs_peer
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
def test_twice_as_fast_as_llmcompressor(runs: Runs, smollm2: Case, method: str, pattern: str) -> None:
    """The perplexity is printed beside its target; only the time fails the run."""
    ours = runs.outcome(smollm2, "thanos", method, pattern)
    theirs = runs.outcome(smollm2, "llmcompressor", "sparsegpt", pattern)
    faster, better = theirs.total / ours.total, ours.perplexity <= theirs.perplexity  # type: ignore[operator]
    runs.verdicts += [
        (f"{method} {pattern}: times as fast", f"{faster:.2f}", reach(f"{TIMES_FASTER:g}", faster >= TIMES_FASTER)),
        (f"{method} {pattern}: perplexity", f"{ours.perplexity:.3f}", reach(f"{theirs.perplexity:.3f}", better)),
    ]
    assert faster >= TIMES_FASTER


def reach(limit: str, reached: bool) -> str:
    return f"{limit}, {'reached' if reached else 'MISSED'}"


def test_tinyllama(benchmark: Any, runs: Runs, tinyllama: Case) -> None:
    measure(benchmark, runs, tinyllama, "thanos", "thanos", "0.5")
