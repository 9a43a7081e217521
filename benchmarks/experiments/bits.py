"""Zeros or fewer bits: pruned models with rounded values beside llama.cpp's types, by bits a weight."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.lab import Lab
from benchmarks.experiments.run import TRAINING, Run
from benchmarks.llama_tools import Tools, cache_folder, convert, quantise
from benchmarks.records import Records, Row
from benchmarks.report.groups import pattern_name
from benchmarks.report.markdown import number, table
from thanos import pack
from thanos.checkpoint import load_model, save_model
from thanos_kernels.sparse_int8 import GROUP

_DENSE = Run("dense", None)
_LLAMA = "llama.cpp"
_TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
_PATTERNS = ("0.5", "2:4")
_VALUES = {"plain": 16, "int8": 8, "int4": 4}  # bits of a kept value
_THREE_BITS = Run(pattern="1:64", quality="balanced", values="int3", source=TRAINING)  # all but dense


def _runs() -> list[Run]:
    pruned = [
        Run(pattern=pattern, quality="balanced", values=values, source=TRAINING)
        for pattern in _PATTERNS
        for values in _VALUES
    ]
    return [_DENSE, *(Run(_LLAMA, None, values=kind) for kind in _TYPES), *pruned, _THREE_BITS]


def measure(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """Perplexity on both texts, and the bits that a weight of the blocks takes on disk."""
    if run == _DENSE:
        return [{"bits": 16.0, **lab.perplexities(lab.model)}]
    with tempfile.TemporaryDirectory() as folder:
        model, bits = (_quantised if run.method == _LLAMA else _pruned)(lab, run, Path(folder))
        return [{"bits": round(bits, 3), **lab.perplexities(model)}]


def _quantised(lab: Lab, run: Run, folder: Path) -> tuple[Any, float]:
    """The weights that llama.cpp makes of the dense model, in this one's dtype."""
    from gguf import GGUFReader

    kit = Tools(cache_folder())
    kit.prepare(print)
    save_model(lab.model, lab.tokenizer, folder / "model")
    convert(kit, folder / "model", folder / "f16.gguf")
    quantise(kit, folder / "f16.gguf", folder / "q.gguf", run.values)
    tensors = [t for t in GGUFReader(folder / "q.gguf").tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    return load_model(str(folder / "q.gguf"), lab.model.dtype), bits


def _pruned(lab: Lab, run: Run, folder: Path) -> tuple[Any, float]:
    """The pruned model, and its bits; of int4 values, which have no packed form, what they would be."""
    model, _ = lab.prune(run)
    if run == _THREE_BITS:
        return model, 3 + 16 / GROUP
    save_model(model.to(torch.bfloat16), lab.tokenizer, folder / "model")
    packed = pack(folder / "model", folder / "packed", values="plain" if run.values == "plain" else "int8")
    bits = 16 * packed.compact_bytes / packed.dense_bytes
    if run.values == "int4":
        bits -= (_VALUES["int8"] - _VALUES["int4"]) / 2  # half of the weights are kept
    return model.to(lab.model.dtype), bits


def section(found: Records) -> list[str]:
    """All rows by their bits."""
    rows = sorted(found.rows, key=lambda row: -row["bits"])
    lines = [[_name(Run(**row["run"])), number(row["bits"]), number(row["perplexity"]), number(row["held_out"])]
             for row in rows]  # fmt: skip
    text = (
        "The dense model in llama.cpp's types, and pruned ones (`--quality balanced`) in the compact form, by the bits "
        "that a weight of the blocks takes, with scales, masks and what llama.cpp keeps in a larger type. Perplexity "
        "on WikiText-2 and on the last eighth of the C4 sample, all in Transformers: of llama.cpp's types the weights "
        "that they hold. Values are rounded while pruning (`--pack int8`); int4 has no packed form. Three bits "
        "are rounded to in the same way, with one weight of 64 removed."
    )
    return [text, table(["weights", "bits", "perplexity", "held out"], lines)]


def _name(run: Run) -> str:
    if run == _DENSE:
        return "dense, bfloat16"
    if run.method == _LLAMA:
        return f"dense, llama.cpp {run.values}"
    if run == _THREE_BITS:
        return "dense, three bits"
    return f"{pattern_name(run.pattern)}, {'bfloat16' if run.values == 'plain' else run.values}"


EXPERIMENT = Experiment(_runs(), {"Zeros, or fewer bits?": section}, measure=measure)
