"""A model that is read block by block is pruned and scored as one in memory, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlamaConfig, LlamaForCausalLM

from tests.mixtures import tiny_mixture
from tests.thanos.walk.test_resume import Stop, content
from thanos.checkpoint import can_convert
from thanos.evaluate import main as evaluate
from thanos.prune import main
from thanos.walk.stream import choose_stream, load_streamed

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(not can_convert(), reason="transformers converts whole checkpoints only")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "the lazy dog sleeps in the sun " * 9 + str(n)}) + "\n" for n in range(9))
    )
    return path


def prune(model: Path, text: Path, output: Path, *options: str) -> Result:
    arguments = [str(model), "--output", str(output), "--calibration", str(text), "--samples", "4", "--device", "cpu"]
    return CliRunner().invoke(main, [*arguments, "--sequence-length", "16", "--memory-limit", "1GiB", *options])


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "falcon", "qwen3_moe", "deepseek_v3", "dbrx"])
def test_streaming_changes_no_byte(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, text: Path, tmp_path: Path
) -> None:
    """Tied and untied embeddings, renamed and merged tensors, buffers of the blocks' own, one file or several."""
    mixture = family in ("qwen3_moe", "deepseek_v3", "dbrx")
    model = tiny_mixture(family) if mixture else tiny_model(family)
    sizes = {"max_shard_size": "20KB"} if family in ("llama", "qwen3_moe") else {}
    model.bfloat16().save_pretrained(tmp_path / "model", **sizes)
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    options = ["--evaluate", str(text), "--windows", "3", "--passes", "1" if family in ("llama", "dbrx") else "2"]
    if family in ("llama", "gemma2", "qwen3_moe"):
        options += ["--targets", "corrected", "--reconstruct", "1"]
    for stream in ("no", "yes"):
        result = prune(tmp_path / "model", text, tmp_path / stream, *options, "--stream", stream)
        assert result.exit_code == 0, result.stderr
        assert ("streaming the model" in result.output) == (stream == "yes")
    assert content(tmp_path / "yes") == content(tmp_path / "no")


def test_what_is_not_at_work_is_not_in_memory(model_folder: Path, text: Path, tmp_path: Path) -> None:
    model, files = load_streamed(str(model_folder))
    blocks = model.model.layers
    outside = parameters(model)
    assert outside == sum(p.numel() for n, p in model.named_parameters() if "layers" not in n)
    assert not any(parameter.is_meta for n, parameter in model.named_parameters() if "layers" not in n)
    files.load(blocks[1])
    assert parameters(model) == outside + sum(parameter.numel() for parameter in blocks[1].parameters())
    files.drop(blocks[1])
    gc.collect()
    assert parameters(model) == outside


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process' memory from /proc")
def test_memory_does_not_grow_with_the_blocks(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=12288, num_hidden_layers=16, num_attention_heads=2, vocab_size=300,
        max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    blocks = sum(tensor.nbytes for tensor in model.model.layers.parameters())
    command = [sys.executable, str(Path(__file__).with_name("streamed_peak.py")), str(tmp_path / "model")]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert blocks > 250e6
    assert int(result.stdout) < 0.4 * blocks


def test_a_streamed_run_goes_on_in_memory_and_the_other_way(model_folder: Path, text: Path, tmp_path: Path) -> None:
    assert prune(model_folder, text, tmp_path / "whole").exit_code == 0
    for first, then in (("yes", "no"), ("no", "yes"), ("yes", "yes")):
        out = tmp_path / f"{first}-{then}"
        with pytest.MonkeyPatch.context() as patch:
            Stop(patch, 1, KeyboardInterrupt())
            prune(model_folder, text, out, "--stream", first)
        result = prune(model_folder, text, out, "--resume", "--stream", then)
        assert result.exit_code == 0, result.stderr
        assert content(out) == content(tmp_path / "whole")


def test_evaluate_streams(model_folder: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for stream in ("no", "yes"):
        output = tmp_path / f"{stream}.json"
        arguments = [str(model_folder), "--perplexity", str(text), "--tasks", "none", "--sequence-length", "16"]
        result = CliRunner().invoke(evaluate, [*arguments, "--stream", stream, "--output", str(output)])
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(output.read_text())["results"])
    assert found[0] == found[1]


def test_files_that_cannot_be_streamed_are_named(model_folder: Path, text: Path, tmp_path: Path) -> None:
    def refused(match: str, *options: str) -> None:
        result = prune(model_folder, text, tmp_path / "out", "--stream", "yes", *options)
        assert result.exit_code == 1
        assert match in result.stderr
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.glob("out*"))

    refused("cannot be saved so with --dtype bfloat16", "--dtype", "bfloat16")
    file = model_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused("model.safetensors is truncated: it ends within model.norm.weight")
    file.write_bytes(whole)
    from safetensors.torch import load_file

    torch.save(load_file(file), model_folder / "pytorch_model.bin")
    file.unlink()
    refused("is not in safetensors, so it cannot be streamed; convert it once")


def test_a_file_that_changes_or_vanishes_is_named(model_folder: Path) -> None:
    model, files = load_streamed(str(model_folder))
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="was changed while it was in use"):
        files.load(model.model.layers[0])
    file.unlink()
    with pytest.raises(ValueError, match="is not there any more"):
        files.load(model.model.layers[1])


def test_a_model_is_streamed_where_it_takes_half_of_the_memory(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (model_folder / "model.safetensors").stat().st_size
    for free, streams in ((2 * size - 2, True), (2 * size + 2, False)):
        monkeypatch.setattr("thanos.walk.stream.available_memory", lambda _, free=free: free)
        assert choose_stream("auto", model_folder)[0] is streams
    assert choose_stream("auto", None)[0] is False
