"""Make a model smaller in two ways, and let both go on with a text: packed zeros, and fewer channels.

python examples/smaller_two_ways.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos

PROMPT = "The for statement is used to"


def main(name: str, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    samples = thanos.load_samples("builtin", tokenizer, samples=16, length=256)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)

    def shown(kind: str, one: Any, path: Path) -> None:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        tokens = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
        said = tokenizer.decode(one.generate(tokens, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
        print(f"{kind}: {size / 1e6:.1f} MB: {said!r}")

    zeros = model()
    thanos.prune_model(zeros, samples.tokens, "0.5")
    sparse, compact, narrow = (Path(folder, part) for part in ("sparse", "compact", "narrow"))
    zeros.save_pretrained(sparse)
    thanos.pack(sparse, compact)
    shown("half zeros", zeros, sparse)
    shown("packed", thanos.load(compact), compact)  # the same model, which runs from its compressed layers

    smaller = thanos.shrink_model(model(), samples.tokens, "channels:0.25")
    smaller.model.save_pretrained(narrow)
    shown("a quarter of the channels less", smaller.model, narrow)


if __name__ == "__main__":
    main(*sys.argv[1:])
