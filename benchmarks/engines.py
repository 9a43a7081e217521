"""A whole model pruned by one engine in a fresh process: where its seconds go, its memory, and how good the result is.

Every engine goes the same way: a model directory is read, pruned and written, first a small one to warm up, then the
one that is measured. What was written is then checked and scored by the same code.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes, resident_bytes
from thanos import prune_model
from thanos.checkpoint import load_config, load_model, load_tokenizer, save_model
from thanos.commands.quiet import silence_libraries
from thanos.scoring.perplexity import perplexity
from thanos.walk.decoder import find_decoder

BLOCK_SIZE = 128  # of SparseGPT, in every engine
DAMPING = 0.01
_WARM_BLOCKS, _WARM_SAMPLES, _WARM_LENGTH = 2, 2, 64

# Prunes (model, tokenizer, samples (N, S), method, pattern) in place; gives the seconds of the parts it tells apart.
Prune = Callable[[Any, Any, Tensor, str, str], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        engine: "thanos" or "llmcompressor".
        method, pattern: as in :func:`thanos.prune_model`.
        model, warm: directories of the model and of the small one of :func:`save_warm_model`.
        samples: (N, S) token ids for calibration.
        text: token ids (T,) for the perplexity, or None.
        window: tokens in a window of the perplexity.
    """

    engine: str
    method: str
    pattern: str
    model: Path
    warm: Path
    samples: Tensor
    text: Tensor | None
    window: int


@dataclass(frozen=True)
class Outcome:
    """What a run took and gave.

    Attributes:
        split: seconds from reading the model to having written it: input_output, what the engine tells apart, other.
        peak_bytes: how far the process grew meanwhile over what it held before it read a model.
        perplexity: of the written model, or None where there is no text.
        sparsity: share of zeros in the weights of the blocks' linear layers.
        threads: that PyTorch computed with.
    """

    split: dict[str, float]
    peak_bytes: int
    perplexity: float | None
    sparsity: float
    threads: int

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        return sum(self.split.values())


def save_warm_model(model: Path, folder: Path) -> None:
    """Write a model of the same widths with two blocks of random weights, with the same tokenizer."""
    from transformers import AutoModelForCausalLM

    config = load_config(str(model))
    config.num_hidden_layers = _WARM_BLOCKS
    small = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    save_model(small, _tokenizer(model), folder)


def run(job: Job) -> Outcome:
    """The job, in a process of its own.

    Raises:
        ValueError: the engine is missing or changed what it was to leave dense.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run, job).result()


def _run(job: Job) -> Outcome:
    silence_libraries()
    prune = partial(_engine(job.engine), method=job.method, pattern=job.pattern)
    base = resident_bytes()
    with (
        redirect_stderr(StringIO()),  # progress bars; errors reach the caller as they are
        tempfile.TemporaryDirectory(prefix="thanos-bench-") as scratch,
    ):
        warm, pruned = Path(scratch, "warm"), Path(scratch, "pruned")
        _prune_directory(prune, job.warm, warm, job.samples[:_WARM_SAMPLES, :_WARM_LENGTH])
        gc.collect()
        split: dict[str, float] = {}
        measured = partial(_prune_directory, prune, job.model, pruned, job.samples)
        peak = peak_bytes(lambda: split.update(measured()), base=base, interval=0.01)
        model = load_model(str(pruned))
        return Outcome(
            split=split,
            peak_bytes=peak,
            perplexity=None if job.text is None else perplexity(model, None, job.text, sequence_length=job.window),
            sparsity=pruned_share(load_model(str(job.model)), model, job.engine),
            threads=torch.get_num_threads(),
        )


def _engine(name: str) -> Prune:
    if name == "thanos":
        return _thanos
    from benchmarks import peers

    return peers.llmcompressor()


def _thanos(model: Any, tokenizer: Any, samples: Tensor, method: str, pattern: str) -> dict[str, float]:
    size = BLOCK_SIZE if method == "sparsegpt" else None
    seconds = prune_model(model, samples, pattern, method=method, block_size=size, damping=DAMPING).seconds
    return {part: seconds[part] for part in ("forward", "hessian", "prune")}


def _prune_directory(
    prune: Callable[..., dict[str, float]], source: Path, target: Path, samples: Tensor
) -> dict[str, float]:
    """Seconds of each part; they sum to those between the first and the last line."""
    begin = time.perf_counter()
    model, tokenizer = load_model(str(source)), _tokenizer(source)
    read = time.perf_counter()
    parts = prune(model, tokenizer, samples)
    done = time.perf_counter()
    save_model(model, tokenizer, target)
    files = time.perf_counter() - done + read - begin
    return {"input_output": files, **parts, "other": done - read - sum(parts.values())}


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory, or None."""
    return load_tokenizer(str(folder)) if (folder / "tokenizer_config.json").exists() else None


def pruned_share(dense: Any, pruned: Any, engine: str) -> float:
    """The share of zeros in the blocks' linear layers of a model.

    Raises:
        ValueError: any other weight differs.
    """
    after = pruned.state_dict()
    layers = {f"{layer.name}.weight" for block in find_decoder(pruned).layers for layer in block}
    for name, tensor in dense.state_dict().items():
        if name not in layers and not torch.equal(tensor, after[name]):
            raise ValueError(f"{engine} changed {name}, which every engine leaves dense, so its run does not compare")
    zeros = sum(int((after[name] == 0).sum()) for name in layers)
    return zeros / sum(after[name].numel() for name in layers)
