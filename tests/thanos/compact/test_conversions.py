"""Compact models are converted whole or not at all, as ordinary models are, and copied with what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.thanos.compact.test_checkpoint import llama, logits, pruned_llama
from thanos import compact


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and its compact form."""
    folder = tmp_path_factory.mktemp("converted")
    pruned_llama(torch.float32).save_pretrained(folder / "pruned")
    compact.pack(folder / "pruned", folder / "compact")
    return folder / "pruned", folder / "compact"


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


REFUSED: dict[str, Callable[[Any], Any]] = {
    "float8": lambda part: part.to(torch.float8_e4m3fn),
    "complex": lambda part: part.to(torch.complex64),
    "keyword": lambda part: part.to(device="cpu", dtype=torch.float8_e5m2),
    "tensor": lambda part: part.to(torch.zeros(1, dtype=torch.complex128)),
    "type": lambda part: part.type(torch.float32),
    "integers": lambda part: part.type(torch.int32),
}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_conversion_leaves_every_module_as_it_was(how: str, folders: tuple[Path, Path]) -> None:
    model = compact.load(folders[1])
    want, before = logits(model), {name: (one, one.dtype) for name, one in state(model).items()}
    for part in (model, model.model, model.model.layers[1]):
        with pytest.raises(TypeError, match=r"restore the dense model|with \.to\(dtype\)"):
            REFUSED[how](part)
        for name, now in state(model).items():
            assert now is before[name][0], name
            assert now.dtype == before[name][1], name
    assert logits(model).equal(want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_converted_model_is_right_and_so_are_copies(dtype: torch.dtype, folders: tuple[Path, Path]) -> None:
    model, pruned = compact.load(folders[1]), transformers.AutoModelForCausalLM.from_pretrained(folders[0])
    want = logits(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    tolerance: Any = {"rtol": 0.05, "atol": 0.05} if dtype != torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(logits(copied.to(dtype)), logits(pruned.to(dtype)), **tolerance)
    assert {one.dtype for one in copied.parameters()} == {dtype}
    assert logits(model).equal(want)
    with pytest.raises(TypeError, match="restore the dense model"):
        copied.to(torch.float8_e4m3fn)
    assert {one.dtype for one in copied.parameters()} == {dtype}


@pytest.mark.parametrize("plain", [True, False])
def test_a_checkpoint_of_several_dtypes_is_a_model_of_one(plain: bool, tmp_path: Path) -> None:
    """Norms kept in float32, and one layer that is, among bfloat16."""
    pruned_llama(torch.bfloat16).save_pretrained(tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    held = load_file(file)
    wide = {name for name in held if "norm" in name or name.endswith("0.mlp.gate_proj.weight")}
    save_file({name: one.float() if name in wide else one for name, one in held.items()}, file, {"format": "pt"})
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    read = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype="auto")
    model: Any = read(tmp_path / "compact") if plain else compact.load(tmp_path / "compact")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    want = logits(read(tmp_path / "pruned"))
    torch.testing.assert_close(logits(model), want, rtol=0.02, atol=0.02)
    model.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "compact").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_without_a_packed_layer_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().to(dtype).save_pretrained(tmp_path / "dense")
    assert set(compact.pack(tmp_path / "dense", tmp_path / "compact").kinds.values()) == {"dense"}
    model = compact.load(tmp_path / "compact")
    assert model.dtype == dtype
    assert logits(model).equal(
        logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto"))
    )


def test_a_model_of_another_shape_is_not_saved_over_its_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = compact.load(folders[1])
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(130, 64), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight was packed with the shape \(128, 64\) and has \(130, 64"
    ):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
