"""Compact checkpoints whose kept values are int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.thanos.compact.test_checkpoint import keep_24, keep_half, pruned_llama
from tests.thanos.compact.test_plain_loading import as_version_1, logits
from thanos import compact
from thanos.commands.pack import main
from thanos.compact import FormatError, forms
from thanos.compact.int8 import Int8BitmaskLinear, Int8Sparse24Linear

NAME = "model.layers.0.mlp.gate_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned_llama(torch.bfloat16).save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "int8", values="int8")
    return tmp_path / "int8"


def test_layers_are_int8_and_what_was_not_pruned_is_not_rounded(folder: Path, tmp_path: Path) -> None:
    model = compact.load(folder)
    block = model.model.layers[0]
    assert isinstance(block.mlp.gate_proj, Int8BitmaskLinear)
    assert isinstance(block.mlp.up_proj, Int8Sparse24Linear)
    assert type(block.self_attn.k_proj) is torch.nn.Linear
    dense = load_file(tmp_path / "pruned" / "model.safetensors")
    assert torch.equal(block.self_attn.k_proj.weight, dense["model.layers.0.self_attn.k_proj.weight"])
    compact.unpack(folder, tmp_path / "restored")
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    assert restored.keys() == dense.keys()
    for name, weight in dense.items():
        rounded = restored[name].float()
        assert (rounded[weight == 0] == 0).all()
        # a half of the last place of int8, as a share of the largest value of 128 columns, and bfloat16's own
        assert (rounded - weight.float()).abs().max() <= weight.float().abs().max() * (0.5 / 127 + 2**-8)
    assert torch.equal(restored[f"{NAME}.weight"], block.mlp.gate_proj.weight)


@pytest.mark.parametrize(("prune", "kind"), [(keep_24, "sparse24_int8"), (keep_half, "bitmask_int8")])
def test_a_half_pruned_layer_takes_about_five_bits_a_weight(prune: Callable[[Tensor], Tensor], kind: str) -> None:
    weight = prune(torch.randn(512, 1024, dtype=torch.bfloat16))
    kept = forms.compress(weight, "x.weight", "file", False, int8=True)
    assert kept is not None
    assert kept[0].kind == kind
    assert 8 * sum(part.nbytes for part in kept[1].values()) / weight.numel() <= 5.2


def test_the_command(tmp_path: Path) -> None:
    pruned_llama(torch.float32).save_pretrained(tmp_path / "pruned")
    sizes = {}
    for values in compact.VALUES:
        arguments = [str(tmp_path / "pruned"), "--output", str(tmp_path / values), "--values", values]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert ("_int8" in result.output) is (values == "int8")
        sizes[values] = sum(path.stat().st_size for path in (tmp_path / values).glob("*.safetensors"))
    assert sizes["int8"] < 0.7 * sizes["plain"]
    result = CliRunner().invoke(main, [str(tmp_path / "pruned"), "--output", str(tmp_path / "x"), "--values", "int3"])
    assert result.exit_code != 0
    with pytest.raises(ValueError, match="values must be one of plain, int8, not 'int3'"):
        compact.pack(tmp_path / "pruned", tmp_path / "x", values="int3")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(wrong: float, tmp_path: Path) -> None:
    model = pruned_llama(torch.bfloat16)
    model.model.layers[0].mlp.gate_proj.weight.data[model.model.layers[0].mlp.gate_proj.weight != 0] = wrong
    model.save_pretrained(tmp_path / "pruned")
    with pytest.raises(ValueError, match=rf"{NAME}\.weight"):
        compact.pack(tmp_path / "pruned", tmp_path / "int8", values="int8")
    assert not (tmp_path / "int8").exists()


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda scales: scales.index_fill(0, torch.tensor([3]), float("nan")),
    "infinite": lambda scales: scales.index_fill(0, torch.tensor([3]), float("inf")),
    "zero": lambda scales: scales.index_fill(0, torch.tensor([3]), 0.0),
    "negative": lambda scales: -scales,
    "another shape": lambda scales: scales[1:].clone(),
    "another dtype": lambda scales: scales.float(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scales_are_refused_before_anything_is_built(
    damage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next(folder.glob("compact-*.safetensors"))
    tensors = load_file(file)
    tensors[f"{NAME}.scales"] = DAMAGES[damage](tensors[f"{NAME}.scales"])
    save_file(tensors, file)
    monkeypatch.setattr("thanos.compact.structure.build", lambda *_, **__: pytest.fail("something was built"))
    with pytest.raises(FormatError, match=r"scales"):
        compact.load(folder)
    with pytest.raises(FormatError):
        compact.unpack(folder, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_the_first_version_has_no_int8(folder: Path) -> None:
    as_version_1(folder)
    with pytest.raises(FormatError, match="kind"):
        compact.load(folder)


def test_an_int8_model_stays_close(folder: Path, tmp_path: Path) -> None:
    compact.unpack(folder, tmp_path / "rounded")
    from transformers import AutoModelForCausalLM

    have = logits(compact.load(folder))
    want = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"))
    assert (have - want).norm() <= 0.02 * want.norm()
