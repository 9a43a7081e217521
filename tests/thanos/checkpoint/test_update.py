"""What is not pruned is not touched; nothing is missing, nothing is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conftest import FAMILIES
from thanos.checkpoint import load_model
from thanos.checkpoint.update import tensor_places
from thanos.prune import main


def prune(source: Path, output: Path, *options: str) -> Any:
    text = source.parent / "text.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 8}) for _ in range(8))
    )
    arguments = [str(source), "--output", str(output), "--calibration", str(text), "--samples", "4"]
    return CliRunner().invoke(main, [*arguments, "--sequence-length", "16", *options])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def headers(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        found[file.name] = content[: 8 + int.from_bytes(content[:8], "little")]
    return found


@pytest.fixture
def source(model_folder: Path) -> Path:
    """A model directory as a hub has them: shards, a licence, remote code, another tool's files, odd formatting."""
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "their_own_key": [1, 2]}, indent=7))
    (model_folder / "LICENSE").write_text("as is")
    (model_folder / "modeling_theirs.py").write_text("# theirs")
    (model_folder / "assets").mkdir()
    (model_folder / "assets" / "preprocessor_config.json").write_text("{}")
    model = load_model(str(model_folder))
    model.save_pretrained(model_folder / "sharded", max_shard_size="20KB")
    (model_folder / "model.safetensors").unlink()
    for file in (model_folder / "sharded").glob("model*"):
        file.rename(model_folder / file.name)
    for file in (model_folder / "sharded").iterdir():
        file.unlink()
    (model_folder / "sharded").rmdir()
    return model_folder


def test_only_pruned_tensors_change(source: Path, tmp_path: Path) -> None:
    assert len(list(source.glob("*.safetensors"))) > 1
    result = prune(source, tmp_path / "out", "--exclude", "down_proj")
    assert result.exit_code == 0, result.stderr
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    assert headers(tmp_path / "out") == headers(source)
    before, after = tensors(source), tensors(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    pruned = {f"{layer['name']}.weight" for layer in report["layers"]}
    assert len(pruned) == 18
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (name in pruned), name
    for layer in report["layers"]:
        weight = after[f"{layer['name']}.weight"]
        assert layer["zeros"] == int((weight == 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_saved_by_its_own_names(
    family: str, tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_model(family).bfloat16().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert headers(tmp_path / "out") == headers(tmp_path / "model")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    zeros = sum(int((value == 0).sum()) for value in again.state_dict().values() if value.dim() >= 2)
    assert zeros >= sum(layer["zeros"] for layer in report["layers"]) > 0


def test_tensors_keep_their_own_dtype(source: Path, tmp_path: Path) -> None:
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata()
        mixed = {n: t if "q_proj" in n else t.bfloat16() for n, t in load_file(file).items()}
        save_file(mixed, file, metadata=metadata)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert prune(source, tmp_path / "out").exit_code == 0
    assert headers(tmp_path / "out") == headers(source)
    assert tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32


def test_another_dtype_is_saved_whole_and_said(source: Path, tmp_path: Path) -> None:
    assert prune(source, tmp_path / "out", "--dtype", "bfloat16").exit_code == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["their_own_key"] == [1, 2]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert (tmp_path / "out" / "LICENSE").read_text() == "as is"
    assert load_model(str(tmp_path / "out")).dtype == torch.bfloat16


def test_an_experts_checkpoint_keeps_its_layout(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from tests.mixtures import tiny_mixture

    try:
        model = tiny_mixture("qwen3_moe")
    except AttributeError:
        pytest.skip("this version of transformers has no such model")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    result = prune(tmp_path / "model", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert headers(tmp_path / "out") == headers(tmp_path / "model")
    halves = [value for name, value in tensors(tmp_path / "out").items() if "experts.1." in name]
    assert halves
    assert sum(int((half == 0).sum()) for half in halves) * 2 == sum(half.numel() for half in halves)


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(model_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edited(model_folder, lambda content: content.__delitem__(name))
    result = prune(model_folder, tmp_path / "out")
    assert result.exit_code == 1
    assert f"lacks the tensor {name}" in result.stderr
    assert not (tmp_path / "out").exists()
    assert prune(model_folder, tmp_path / "out", "--allow-missing").exit_code == 0


def test_an_unknown_tensor_is_named_and_kept_by_those_who_know(model_folder: Path, tmp_path: Path) -> None:
    edited(model_folder, lambda content: content.update({"mtp.head.weight": torch.ones(3, 3)}))
    result = prune(model_folder, tmp_path / "out")
    assert "does not know, the tensor mtp.head.weight" in result.stderr
    assert prune(model_folder, tmp_path / "out", "--allow-missing").exit_code == 0
    assert torch.equal(tensors(tmp_path / "out")["mtp.head.weight"], torch.ones(3, 3))


@pytest.mark.parametrize("options", [["--dtype", "float16"], ["--pattern", "depth:1"]])
def test_what_transformers_leaves_out_is_not_lost_without_a_word(
    options: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(model_folder, lambda content: content.update({"mtp.head.weight": torch.ones(3, 3)}))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert prune(model_folder, tmp_path / "same").exit_code == 0
    assert "mtp.head.weight" in tensors(tmp_path / "same")
    result = prune(model_folder, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert "holds the tensor mtp.head.weight, which its model class leaves out" in result.stderr
    result = prune(model_folder, tmp_path / "out", *options, "--allow-missing")
    assert result.exit_code == 0, result.stderr


def test_a_tensor_of_another_shape_is_named(model_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edited(model_folder, lambda content: content.update({name: torch.ones(3, 3)}))
    result = prune(model_folder, tmp_path / "out")
    assert result.exit_code == 1
    assert name in result.stderr


def test_buffers_of_old_checkpoints_are_no_unknown_tensors(model_folder: Path, tmp_path: Path) -> None:
    edited(
        model_folder,
        lambda content: content.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    )
    assert prune(model_folder, tmp_path / "out").exit_code == 0


def test_pruning_again_counts_what_is_zero_already(model_folder: Path, tmp_path: Path) -> None:
    assert prune(model_folder, tmp_path / "first", "--pattern", "0.7").exit_code == 0
    assert prune(tmp_path / "first", tmp_path / "again", "--pattern", "0.5", "--method", "magnitude").exit_code == 0
    report = json.loads((tmp_path / "again" / "pruning.json").read_text())
    assert report["effective_sparsity"] == pytest.approx(0.7, abs=0.001)


def test_a_damaged_file_is_named(model_folder: Path, tmp_path: Path) -> None:
    file = model_folder / "model.safetensors"
    for content in (file.read_bytes()[:100], b"\xff" * 16, b"", (2).to_bytes(8, "little") + b"[]"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
            tensor_places([file])
