"""Perplexity of SmolLM2-135M-Instruct made smaller: ``python -m benchmarks.shrink channels:0.25 depth:6 ...``.

32 samples of 512 tokens of C4 decide; perplexity is that of the first windows of 1024 tokens of WikiText-2, and of 16
samples of C4 that decide nothing.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.smollm2 import NAME, load_smollm2
from thanos.checkpoint import DTYPES
from thanos.commands.quiet import silence_libraries
from thanos.pattern import IMPORTANCES
from thanos.scoring.perplexity import load_tokens, perplexity
from thanos.shrink import shrink_model
from thanos.text import load_samples

DATA = Path("../shared/data")
_SAMPLES, _HELD, _LENGTH = 32, 16, 512


@click.command()
@click.argument("patterns", nargs=-1, required=True)
@click.option("--calibration", default=str(DATA / "c4-sample.jsonl"), help="As for thanos.prune.")
@click.option("--evaluate", default=str(DATA / "wikitext2-test.txt"), help="As for thanos.prune.")
@click.option("--windows", default=16, type=click.IntRange(min=1))
@click.option("--importance", default="obs", type=click.Choice(list(IMPORTANCES)))
@click.option("--multiple", default=64, type=click.IntRange(min=1))
@click.option("--damping", default=None, type=float)
@click.option("--correction", default=None, type=float)
@click.option("--reconstruct", default=0, type=click.IntRange(min=0), metavar="EPOCHS")
@click.option("--dtype", default="float32", type=click.Choice(list(DTYPES)))
@click.option("--dense/--no-dense", default=True, help="Score the dense model too.")
def main(patterns: tuple[str, ...], dense: bool, dtype: str, **options: Any) -> None:
    """Print one JSON line for the dense model and for each of PATTERNS."""
    silence_libraries()
    model, tokenizer = load_smollm2(DTYPES[dtype])
    calibration, evaluate, windows = options.pop("calibration"), options.pop("evaluate"), options.pop("windows")
    samples = load_samples(calibration, tokenizer, _SAMPLES + _HELD, _LENGTH, seed=0).tokens
    text, held = load_tokens(evaluate, tokenizer), samples[_SAMPLES:].flatten()
    chosen = {name: value for name, value in options.items() if value is not None}

    def show(name: str, one: Any, **more: Any) -> None:
        scores = {
            "text": perplexity(one, tokenizer, text, sequence_length=1024, windows=windows),
            "held_out": perplexity(one, tokenizer, held, sequence_length=_LENGTH),
        }
        print(json.dumps({"model": NAME, "pattern": name, "perplexity": scores, **more}), flush=True)

    if dense:
        show("dense", model)
    for pattern in patterns:
        torch.manual_seed(0)
        shrunk = shrink_model(copy.deepcopy(model), samples[:_SAMPLES], pattern, **chosen)
        report = shrunk.report
        show(
            pattern, shrunk.model, sparsity=report.effective_sparsity, became=shrunk.became, seconds=report.seconds,
            options=chosen,
        )  # fmt: skip


if __name__ == "__main__":
    main()
