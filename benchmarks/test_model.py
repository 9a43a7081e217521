"""Whole models from directory to directory: where the seconds go, peak memory, perplexity, beside llm-compressor.

SmolLM2-135M-Instruct by three methods, and a random model of TinyLlama-1.1B's shapes by Thanos. With the extra
``peers``, llm-compressor's SparseGPT and Wanda take the same samples, layers and dtype, and ours must be twice as fast.
Every run has a process of its own, warmed up on a small model (see benchmarks/engines.py).

Environment variables: THANOS_BENCH_SAMPLES (32), THANOS_BENCH_LENGTH (512), THANOS_BENCH_WINDOWS (16, of 1024 tokens,
for the perplexity) and THANOS_BENCH_PATTERNS (0.5; such as 0.5,2:4).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.engines import BLOCK_SIZE, DAMPING, Job, Outcome, run, save_warm_model
from benchmarks.smollm2 import NAME, fast_dtype, load_smollm2
from thanos.bench_inference import random_tinyllama
from thanos.checkpoint import save_model
from thanos.pattern import parse_pattern
from thanos.scoring.perplexity import load_tokens
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


@dataclass(frozen=True, eq=False)
class Case:
    """A model in a directory, with all that its runs share."""

    model: str
    job: Job  # engine, method and pattern still open
    settings: dict[str, str]


Measure = Callable[[Case, str, str, str], None]


@cache
def outcome(case: Case, engine: str, method: str, pattern: str) -> Outcome:
    """Each run is made once and kept for the comparison."""
    return run(replace(case.job, engine=engine, method=method, pattern=pattern))


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


@pytest.fixture
def measure(record: Callable[..., None], finding: Callable[[str], None]) -> Measure:
    """Call it with a case, an engine, a method and a pattern."""

    def measured(case: Case, engine: str, method: str, pattern: str) -> None:
        found, text = outcome(case, engine, method, pattern), case.job.text
        count, told = {"samples": len(case.job.samples), "length": LENGTH}, {"engine": engine, "method": method}
        name = f"{case.model}, {count['samples']} x {LENGTH} tokens: {engine} {method} {pattern}"
        settings = case.settings | {"threads": str(found.threads), "effective sparsity": f"{found.sparsity:.6f}"}
        record(
            name,
            kind="model",
            model=case.model,
            **told,
            pattern=pattern,
            **count,
            dtype=case.settings["dtype"],
            split=found.split if engine == "thanos" else {},
            total=found.total,
            peak_bytes=found.peak_bytes,
            perplexity=found.perplexity,
            perplexity_tokens=0 if text is None else len(text) // WINDOW * (WINDOW - 1),
            settings=settings | (peers.settings() if engine == "llmcompressor" else {}),
        )
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in found.split.items())
        score = f", perplexity {found.perplexity:.2f}" if found.perplexity else ""
        finding(f"{name}: {found.total:.1f} s ({parts}), {found.peak_bytes / 1e6:.0f} MB{score}")
        nominal = parse_pattern(pattern).sparsity
        assert abs(found.sparsity - nominal) < 1e-3, f"{engine} pruned {found.sparsity:.2%} instead of {nominal:.2%}"

    return measured


needs_peer = pytest.mark.skipif(bool(peers.missing()), reason=peers.missing())
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@each_pattern
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda"])
def test_smollm2(measure: Measure, smollm2: Case, method: str, pattern: str) -> None:
    measure(smollm2, "thanos", method, pattern)


@needs_peer
@each_pattern
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_smollm2_by_llmcompressor(measure: Measure, smollm2: Case, method: str, pattern: str) -> None:
    measure(smollm2, "llmcompressor", method, pattern)


@needs_peer
@each_pattern
@pytest.mark.parametrize("method", ["thanos", "sparsegpt"])
def test_twice_as_fast_as_llmcompressor(
    finding: Callable[[str], None], smollm2: Case, method: str, pattern: str
) -> None:
    """The perplexity is printed beside its target; only the time fails the run."""
    ours = outcome(smollm2, "thanos", method, pattern)
    theirs = outcome(smollm2, "llmcompressor", "sparsegpt", pattern)
    faster = theirs.total / ours.total
    finding(
        f"{method} {pattern} against llm-compressor's SparseGPT: {faster:.2f} times as fast (to reach: "
        f"{TIMES_FASTER:g}), perplexity {ours.perplexity:.3f} (to reach: {theirs.perplexity:.3f})"
    )
    assert faster >= TIMES_FASTER


def test_tinyllama(measure: Measure, tinyllama: Case) -> None:
    measure(tinyllama, "thanos", "thanos", "0.5")
