"""Prune a model with every method, and compare the perplexities. SmolLM2-135M takes a minute and a half on two cores.

python examples/compare_methods.py MODEL [PATTERN]
"""

from __future__ import annotations

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos


def main(name: str, pattern: str = "0.5") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dense = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    # Python's own documentation: nothing to download. Three quarters of it to prune on, the rest to measure.
    samples = thanos.load_samples("builtin", tokenizer, samples=16, length=256)

    def score(model: torch.nn.Module) -> float:
        return thanos.perplexity(model, tokenizer, "builtin", sequence_length=256, windows=8)

    print(f"{'dense':12} perplexity {score(dense):9.2f}")
    for method in ("magnitude", "wanda", "sparsegpt", "thanos"):
        model = copy.deepcopy(dense)
        report = thanos.prune_model(model, samples.tokens, pattern, method=method)
        seconds = report.seconds["total"]
        print(f"{method:12} perplexity {score(model):9.2f}, {report.effective_sparsity:.1%} zeros, {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
