"""The inference benchmark measures both forms of a model and prints one table."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from thanos import bench_inference, compact

transformers = pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data[:, ::2] = 0
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("form", ["ordinary", "compact"])
def test_the_table_has_every_number(form: str, checkpoint: Path, tmp_path: Path) -> None:
    model = checkpoint
    if form == "compact":
        model = tmp_path / "compact"
        compact.pack(checkpoint, model)
    before = sorted(path.name for path in model.iterdir())
    arguments = [str(model), "--prompt", "16", "--tokens", "2", "--repeats", "1"]
    result = CliRunner().invoke(bench_inference.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for label in ("dense", "compact", "file size", "weights in memory", "decoding, batch 1", "prompt of 16 tokens"):
        assert label in result.output
    assert sorted(path.name for path in model.iterdir()) == before


def test_shared_weights_count_once() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    shared = torch.nn.Linear(8, 8, bias=False)
    shared.weight = layer.weight
    assert bench_inference.weight_bytes(torch.nn.Sequential(layer, shared)) == 8 * 8 * 4


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench_inference.main, [str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output
