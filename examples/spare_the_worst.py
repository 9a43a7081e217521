"""Prune, find the layers that lost the most, and prune again without them: does it pay?

python examples/spare_the_worst.py MODEL [PATTERN]
"""

from __future__ import annotations

import copy
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos
from thanos.report.record import ModelReport

SPARED = 3


def main(name: str, pattern: str = "2:4") -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    dense = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    samples = thanos.load_samples("builtin", tokenizer, samples=16, length=256)

    def pruned(exclude: str | None) -> ModelReport:
        model = copy.deepcopy(dense)
        report = thanos.prune_model(model, samples.tokens, pattern, exclude=exclude)
        score = thanos.perplexity(model, tokenizer, "builtin", sequence_length=256, windows=8)
        print(f"{report.effective_sparsity:.1%} zeros: perplexity {score:.2f}")
        return report

    worst = sorted(pruned(None).layers, key=lambda layer: layer.relative_loss)[-SPARED:]
    for layer in reversed(worst):
        print(f"  {layer.name} lost {layer.relative_loss:.1%} of its output")
    print(f"and with these {SPARED} left dense:")
    pruned("|".join(f"^{re.escape(layer.name)}$" for layer in worst))


if __name__ == "__main__":
    main(*sys.argv[1:])
