"""Models that come with code of their own: run where the user says so, and only there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

import thanos
from thanos import bench_inference, checkpoint, evaluate, prune
from thanos.commands import pack

CODE = """
import transformers
from pathlib import Path

(Path(__file__).parent / "ran").touch()


class MyConfig(transformers.LlamaConfig):
    model_type = "mine"


class MyModel(transformers.LlamaForCausalLM):
    config_class = MyConfig
"""
TEXT = "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun " * 40


@pytest.fixture
def remote(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Iterator[Path]:
    """A directory whose model is of a type that Transformers does not know, and asks to be trusted."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MyModel"],
        "auto_map": {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"},
        "trust_remote_code": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(CODE)
    (tmp_path / "text.txt").write_text(TEXT)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def arguments(folder: Path) -> tuple[list[str], list[str]]:
    text = str(folder.parent / "text.txt")
    output = str(folder.parent / "pruned")
    pruning = ["--output", output, "--calibration", text, "--samples", "4", "--sequence-length", "16"]
    scoring = ["--perplexity", text, "--tasks", "none", "--sequence-length", "16"]
    return [str(folder), *pruning], [str(folder), *scoring]


def test_no_code_of_a_model_is_run_unless_the_user_says_so(remote: Path) -> None:
    for command, given in zip((prune.main, evaluate.main), arguments(remote), strict=True):
        result = CliRunner().invoke(command, given, input="y\n" * 9)
        assert result.exit_code == 1
        assert "comes with Python code of its own" in result.stderr
        assert "--trust-remote-code" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    for read in (checkpoint.load_config, checkpoint.load_model):
        with pytest.raises(ValueError, match="--trust-remote-code"):
            read(str(remote))
    assert not any("mine" in name for name in sys.modules if name.startswith("transformers_modules"))
    assert not (remote.parent / "pruned").exists()


def test_a_trusted_model_is_pruned_and_evaluated(remote: Path) -> None:
    for command, given in zip((prune.main, evaluate.main), arguments(remote), strict=True):
        result = CliRunner().invoke(command, [*given, "--trust-remote-code"])
        assert result.exit_code == 0, result.output
    state = transformers.LlamaForCausalLM.from_pretrained(
        str(remote.parent / "pruned"), config=transformers.LlamaConfig.from_pretrained(str(remote))
    )
    assert int((state.model.layers[1].mlp.down_proj.weight == 0).sum()) == 32 * 48 // 2
    assert isinstance(state, torch.nn.Module)


def test_a_trusted_model_is_packed_and_loaded(remote: Path) -> None:
    pruning, _ = arguments(remote)
    pruned, output = str(remote.parent / "pruned"), str(remote.parent / "compact")
    assert CliRunner().invoke(prune.main, [*pruning, "--trust-remote-code"]).exit_code == 0
    result = CliRunner().invoke(pack.main, [pruned, "--output", output])
    assert result.exit_code == 1
    assert "--trust-remote-code" in result.stderr
    result = CliRunner().invoke(pack.main, [pruned, "--output", output, "--trust-remote-code"])
    assert result.exit_code == 0, result.stderr
    measured = [pruned, "--prompt", "8", "--tokens", "1", "--repeats", "1"]
    assert "--trust-remote-code" in CliRunner().invoke(bench_inference.main, measured).stderr
    result = CliRunner().invoke(bench_inference.main, [*measured, "--trust-remote-code"])
    assert result.exit_code == 0, result.stderr
    with pytest.raises(ValueError, match="--trust-remote-code"):
        thanos.load(output)
    model = thanos.load(output, trust_remote_code=True)
    dense = checkpoint.load_model(pruned, trust_remote_code=True)
    tokens = torch.arange(12)[None]
    assert type(model).__name__ == "MyModel"
    assert torch.allclose(model(tokens).logits, dense(tokens).logits, atol=1e-5)
