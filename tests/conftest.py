"""Tiny random models of many families and a tiny tokenizer, made without a network."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels are tested on the CPU

import transformers

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_OLD = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 4}),
    "gemma3": (
        "Gemma3Text",
        {**_GEMMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "opt": ("OPT", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", _OLD),
    "gptj": ("GPTJ", {**_OLD, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", _COMMON),
    "phi": ("Phi", _COMMON),
    "phi3": ("Phi3", _GROUPED),
    "falcon": ("Falcon", {**_COMMON, "new_decoder_architecture": False, "multi_query": True}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "olmo2": ("Olmo2", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "cohere": ("Cohere", _GROUPED),
    "starcoder2": ("Starcoder2", _GROUPED),
    "mamba": ("Mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}),
}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(family, **changes)``: a random model of three blocks or so in evaluation mode, float32."""

    def build(family: str, **changes: Any) -> Any:
        config_name, options = FAMILIES[family]
        options = {**options, **changes}
        if "layer_types" in options:
            options["num_hidden_layers"] = len(options["layer_types"])
        torch.manual_seed(0)
        config = getattr(transformers, f"{config_name}Config")(**options)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture
def token_samples() -> torch.Tensor:
    """(6, 20) random token ids below 96."""
    return torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(1))


@functools.cache
def trained_tokenizer() -> str:
    """A byte-pair tokenizer of 96 tokens as JSON, trained on a few words, that any text survives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 20
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([words], trainer)
    return tokenizer.to_str()


def new_tokenizer(*, bos: bool = False) -> Any:
    """That tokenizer, new, so that what a test sets on it no other test sees; with ``bos``, token 1 begins a text."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(trained_tokenizer())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def tiny_tokenizer() -> Any:
    """A byte-pair tokenizer of 96 tokens, the test's own."""
    return new_tokenizer()


@pytest.fixture
def bos_tokenizer() -> Any:
    """The tiny tokenizer, which puts its ``<s>``, token 1, in front of a text."""
    return new_tokenizer(bos=True)


@pytest.fixture(params=["meta", "float64"])
def other_default(request: pytest.FixtureRequest) -> Iterator[None]:
    """The body runs with another default device, or another default dtype."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
    else:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(dtype)


@pytest.fixture
def model_folder(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2", "portable"])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during a test: each that this machine and its compiler have."""
    from thanos_kernels import native

    if not native.available() or request.param not in native._C.isas():
        pytest.skip(f"there is no {request.param} here")
    before = native._C.isa()
    native._C.use_isa(request.param)
    yield request.param
    native._C.use_isa(before)
