"""The peer: llm-compressor's SparseGPT and Wanda, given the samples, layers and settings that this engine is given."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import BLOCK_SIZE, DAMPING, Prune

PACKAGES = ("llmcompressor", "compressed-tensors")
BATCH_SIZE = 1  # its default


def missing() -> str:
    """Why the peer cannot run here and what to do, or nothing."""
    if find_spec("llmcompressor") is not None:
        return ""
    return "llmcompressor is not installed: pip install '.[peers]'; CONTRIBUTING.md says how beside pinned versions"


def settings() -> dict[str, str]:
    """What a report says of the peer beyond what both engines share: its versions and the batch size."""
    return {**{package: version(package) for package in PACKAGES}, "batch size": str(BATCH_SIZE)}


def llmcompressor() -> Prune:
    """Import it; the result tells no part of its time apart.

    Raises:
        ValueError: it is not installed.
    """
    if missing():
        raise ValueError(missing())
    os.environ |= {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    def prune(model: Any, tokenizer: Any, samples: Tensor, method: str, pattern: str) -> dict[str, float]:
        options: dict[str, Any] = {"targets": ["Linear"], "ignore": ["re:.*lm_head"], **_sparsity(pattern)}
        if method == "sparsegpt":
            modifier = SparseGPTModifier(**options, block_size=BLOCK_SIZE, dampening_frac=DAMPING)
        else:
            modifier = WandaPruningModifier(**options)
        rows = [{"input_ids": sample, "attention_mask": torch.ones_like(sample)} for sample in samples]
        data = torch.utils.data.DataLoader(rows, batch_size=BATCH_SIZE)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:  # it reads the configuration again where the model is from
            model.config.save_pretrained(folder)
            own, model.config.name_or_path = model.config.name_or_path, folder
            oneshot(model=model, processor=tokenizer, dataset=data, recipe=modifier)
            model.config.name_or_path = own
        return {}

    return prune


def _sparsity(pattern: str) -> dict[str, Any]:
    """The modifiers' options for an unstructured or an n:m pattern."""
    if ":" not in pattern:
        return {"sparsity": float(pattern)}
    pruned, group = map(int, pattern.split(":"))
    return {"sparsity": pruned / group, "mask_structure": f"{pruned}:{group}"}
