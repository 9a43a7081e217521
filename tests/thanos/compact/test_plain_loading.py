"""``from_pretrained`` of Transformers reads compact checkpoints once Thanos is imported, and fails loudly before."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.test_two_transformers import OLDER
from tests.thanos.compact.test_checkpoint import edit, pruned_llama
from thanos import compact
from thanos.compact import FormatError
from thanos.compact.base import SparseLinear
from thanos.compact.files import METHOD

ROOT = Path(__file__).parents[3]

TOKENS = torch.arange(24, dtype=torch.int64, device="cpu")[None]
PACKED = "model.layers.0.mlp.gate_proj"


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS).logits
    return result.float()


def as_version_1(folder: Path) -> None:
    """Make a directory what the first version of the format was: no index, no mark, no place holders."""
    (folder / "model.safetensors.index.json").unlink()
    edit(folder / "compact.json", lambda content: content.update(version=1))
    edit(folder / "config.json", lambda content: content.pop("quantization_config"))
    layers = json.loads((folder / "compact.json").read_text())["layers"].values()
    held_back = {layer["tensor"] for layer in layers}
    for file in folder.glob("compact-*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(file).items() if name not in held_back}, file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned_llama(torch.bfloat16).save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact")
    return tmp_path / "compact"


@pytest.mark.parametrize("values", compact.VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_compact_model_loads_plainly(dtype: torch.dtype, values: str, tmp_path: Path) -> None:
    pruned_llama(dtype).save_pretrained(tmp_path / "pruned", max_shard_size="40KB")
    compact.pack(tmp_path / "pruned", tmp_path / "compact", values=values)
    want = compact.load(tmp_path / "compact")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "compact", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == dtype
    assert not model.training
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == 10
    assert torch.equal(logits(model), logits(want))
    model.save_pretrained(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "compact").iterdir()
    }


def test_what_was_loaded_plainly_is_a_model_as_any(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    want = logits(model)
    torch.testing.assert_close(want, logits(compact.load(folder)), rtol=0.05, atol=0.01)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(TOKENS).logits, want)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(TOKENS, **options)
    assert torch.equal(model.generate(TOKENS, cache_implementation="static", **options), generated)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_saves_itself(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    other = copy.deepcopy(model)
    other.model.norm.weight.data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(compact.load(tmp_path / "other").model.norm.weight, other.model.norm.weight)


def test_the_first_version_is_read_by_load(folder: Path, tmp_path: Path) -> None:
    want = logits(compact.load(folder))
    as_version_1(folder)
    assert torch.equal(logits(compact.load(folder)), want)
    compact.unpack(folder, tmp_path / "restored")
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "restored" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    with pytest.raises(OSError, match="no file named"):  # not even Transformers alone takes it for a model
        AutoModelForCausalLM.from_pretrained(folder)


def _alone(folder: Path, path: Path | None) -> subprocess.CompletedProcess[str]:
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    environment = {"PYTHONPATH": str(path)} if path is not None else {}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd="/", check=False)


@pytest.mark.parametrize("values", compact.VALUES)
@pytest.mark.parametrize("older", [False, True])
def test_without_thanos_transformers_refuses(older: bool, values: str, tmp_path: Path) -> None:
    if older and not OLDER.is_dir():
        pytest.skip("Transformers 4.57 is not beside the other packages: make test puts it there")
    pruned_llama(torch.bfloat16).save_pretrained(tmp_path / "pruned")
    compact.pack(tmp_path / "pruned", tmp_path / "compact", values=values)
    done = _alone(tmp_path / "compact", OLDER if older else None)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower() or METHOD in done.stderr, done.stderr


@pytest.mark.parametrize("first", ["thanos", "transformers", "transformers.quantizers.auto"])
def test_the_order_of_imports_does_not_matter(first: str, folder: Path) -> None:
    lines = [
        f"import {first}",
        "import sys, thanos",
        f"assert ('transformers' in sys.modules) is {first != 'thanos'}",  # importing Thanos stays quick
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "assert type(model.model.layers[0].mlp.gate_proj).__name__ == 'BitmaskLinear'",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT, timeout=120)


def _change(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, change)


HAND: dict[str, tuple[Callable[[Path], None], str]] = {
    "another width": (_change("config.json", lambda c: c.update(intermediate_size=104)), "asks for"),
    "absurd depth": (_change("config.json", lambda c: c.update(num_hidden_layers=10**9)), "asks for 1000000000 layers"),
    "another format": (_change("config.json", lambda c: c["quantization_config"].update(format="x")), "format 'x'"),
    "version 3": (_change("compact.json", lambda c: c.update(version=3)), "reads versions 1 to 2"),
    "no manifest": (lambda folder: (folder / "compact.json").unlink(), r"compact\.json"),
    "elsewhere": (
        _change("compact.json", lambda c: c["sources"][0].update(file="../x")),
        "not the name of a file beside it",
    ),
}


@pytest.mark.parametrize("hand", HAND)
def test_a_checkpoint_changed_by_hand_is_refused_in_a_sentence(hand: str, folder: Path) -> None:
    change, sentence = HAND[hand]
    change(folder)
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)
    if hand != "another format":  # load goes by the manifest
        with pytest.raises(ValueError, match=sentence):
            compact.load(folder)


def test_a_model_that_is_quantised_already_is_not_packed(folder: Path, tmp_path: Path) -> None:
    edit(tmp_path / "pruned" / "config.json", lambda c: c.update(quantization_config={"quant_method": "other"}))
    with pytest.raises(ValueError, match=r"holds quantised weights \(other\)"):
        compact.pack(tmp_path / "pruned", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_unpacking_takes_the_mark_back(folder: Path, tmp_path: Path) -> None:
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    compact.unpack(folder, tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").read_bytes() == (tmp_path / "pruned" / "config.json").read_bytes()
    assert not (tmp_path / "plain" / "model.safetensors.index.json").exists()
    edit(folder / "config.json", lambda content: content)  # as other programs write it: the mark is found all the same
    compact.unpack(folder, tmp_path / "edited")
    assert "quantization_config" not in json.loads((tmp_path / "edited" / "config.json").read_text())
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="holds no configuration"):
        compact.unpack(folder, tmp_path / "damaged")
