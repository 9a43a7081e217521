"""Model directories as people have them: quantised, with adapters, in other layouts of files, in awkward places."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.mixtures import tiny_mixture
from tests.thanos.checkpoint.test_update import prune, tensors
from thanos import compact
from thanos.checkpoint import can_convert, check_target, load_model

needs_5 = pytest.mark.skipif(
    not can_convert(), reason="before version 5 Transformers does not read these without a GPU"
)


def said(result: Any) -> str:
    return " ".join(result.stderr.split())


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def fp8(model_folder: Path) -> Path:
    """The tiny Llama as FP8 models are stored: blocks of 16 x 16 with a scale each."""

    def quantise(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if name.endswith("proj.weight")]:
            weight = held[name].float()
            scale = weight.abs().max() / 448
            held[name] = (weight / scale).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = torch.full([side // 16 for side in weight.shape], float(scale))

    rewrite(model_folder, quantise)
    how = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    configure(model_folder, quantization_config=how, dtype="bfloat16")
    return model_folder


@needs_5
def test_a_model_in_fp8_is_saved_as_what_it_was_pruned_in(fp8: Path, tmp_path: Path) -> None:
    result = prune(fp8, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    held = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert not any(name.endswith("scale_inv") for name in held)
    model = load_model(str(tmp_path / "out"))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert int((weight == 0).sum()) >= weight.numel() // 2
    assert model.dtype == torch.bfloat16


@needs_5
def test_experts_in_mxfp4_are_saved_as_what_they_were_pruned_in(
    tiny_tokenizer: Any, token_samples: torch.Tensor, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    tiny_mixture("gpt_oss", intermediate_size=32).to(torch.bfloat16).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)

    def quantise(held: dict[str, torch.Tensor]) -> None:
        draw = torch.Generator("cpu").manual_seed(0)
        for name in [name for name in held if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inputs, outputs = held.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            held[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
            held[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)

    rewrite(source, quantise)
    configure(source, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    result = prune(source, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = load_model(str(tmp_path / "out"))
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    assert int((fused == 0).sum()) >= fused.numel() // 2
    assert bool(model(token_samples).logits.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8])
def test_matrices_of_packed_numbers_are_named(dtype: torch.dtype, model_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(model_folder, lambda held: held.update({name: (held[name] * 8).to(dtype)}))
    with pytest.raises(ValueError, match=f"holds {name} as "):
        compact.pack(model_folder, tmp_path / "compact")
    with pytest.raises(ValueError, match=f"holds {name} as "):
        load_model(str(model_folder))
    result = prune(model_folder, tmp_path / "out")
    assert f"holds {name} as " in said(result)
    assert not (tmp_path / "out").exists()


def test_quantised_models_are_not_packed(model_folder: Path, tmp_path: Path) -> None:
    configure(model_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"holds quantised weights \(gptq\)"):
        compact.pack(model_folder, tmp_path / "compact")


@pytest.mark.parametrize("beside", [True, False])
def test_adapters_are_to_be_merged(beside: bool, model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    if not beside:
        (model_folder / "config.json").unlink()
    assert "holds an adapter of PEFT; merge it into its model first" in said(prune(model_folder, tmp_path / "out"))


def test_shards_in_a_directory_of_their_own_stay_there(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "shards").mkdir()
    (model_folder / "model.safetensors").rename(model_folder / "shards" / "a.safetensors")
    names = load_file(model_folder / "shards" / "a.safetensors")
    index = model_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "shards/a.safetensors")}))
    result = prune(model_folder, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    weight = load_model(str(tmp_path / "out")).model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../model/shards/a.safetensors")}))
    assert "a.safetensors, which is not in its directory" in said(prune(model_folder, tmp_path / "other"))


def test_a_snapshot_of_links_is_copied_and_its_files_stay(model_folder: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where a snapshot links to files named by their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model_folder.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    result = prune(snapshot, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before


def test_an_output_inside_its_model_or_around_it_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model_folder)
    for target in (model_folder / "pruned", tmp_path / "link" / "a" / "b"):
        with pytest.raises(ValueError, match="lies inside the model"):
            check_target(target, overwrite=True, source=str(model_folder))
    (model_folder / "inner").mkdir()
    with pytest.raises(ValueError, match="holds the model"):
        check_target(model_folder, overwrite=True, source=str(model_folder / "inner"))
    assert "lies inside the model" in said(prune(model_folder, model_folder / "pruned"))
    assert not (model_folder / "pruned").exists()
    check_target(tmp_path / "beside", overwrite=False, source=str(model_folder))


@pytest.mark.parametrize("given", [{"do_sample": False, "temperature": 0.5}, {"a_word_of_its_own": 1}, None])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_settings_of_generation_stay_whatever_they_are(
    given: Any, dtype: str, model_folder: Path, tmp_path: Path
) -> None:
    file = model_folder / "generation_config.json"
    file.write_text("{" if given is None else json.dumps(given))
    result = prune(model_folder, tmp_path / "out", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stored", ["tied", "both", "other head", "head alone"])
def test_tied_embeddings_stay_as_they_are_stored(
    stored: str, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"

    def change(held: dict[str, torch.Tensor]) -> None:
        if stored != "tied":
            held[head] = torch.randn(96, 32) if stored == "other head" else held[embeddings].clone()
        if stored == "head alone":
            del held[embeddings]

    rewrite(source, change)
    result = prune(source, tmp_path / "out")
    if stored == "head alone" and not can_convert():  # such a model has no embeddings in Transformers 4
        assert f"lacks the tensor {embeddings}" in said(result)
        return
    assert result.exit_code == 0, result.stderr
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before.keys() & {head, embeddings}:
        assert before[name].equal(after[name])
    assert isinstance(load_model(str(tmp_path / "out")), transformers.LlamaForCausalLM)


def test_a_tokenizer_that_is_not_there_is_named(model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.glob("tokenizer*"):
        path.unlink()
    assert f"cannot read the tokenizer of {model_folder}: none of its files" in said(
        prune(model_folder, tmp_path / "out")
    )
    (model_folder / "tokenizer.json").write_text("{")
    assert f"cannot read the tokenizer of {model_folder}: Expecting" in said(prune(model_folder, tmp_path / "out"))
