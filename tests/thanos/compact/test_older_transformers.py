"""Packing under Transformers 4: it renames tensors, as of models with a vision part, and merges none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_two_transformers import OLDER
from tests.thanos.compact.test_families import logits
from thanos import compact
from thanos.checkpoint import can_convert, load_model
from thanos.compact.base import SparseLinear

pytestmark = pytest.mark.skipif(
    not OLDER.is_dir(), reason="Transformers 4.57 is not beside the other packages: make test puts it there"
)

_OLDER = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from tests.thanos.compact.test_families import halve, logits, same_bytes
from thanos import compact, prune_model
from thanos.checkpoint import load_model, save_pruned
from thanos.compact.base import SparseLinear
from thanos.walk.model import pruned_parameters

assert transformers.__version__.startswith("4.")
root, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
picture = {name: size for name, size in sizes.items() if name != "vocab_size"}
picture |= {"image_size": 16, "patch_size": 8, "projection_dim": 16}
config = {
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes), vision_config=transformers.CLIPVisionConfig(**picture),
        image_token_index=90),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(**picture), mm_tokens_per_image=4, image_token_index=90),
    "mixtral": lambda: transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes),
}
renamed = {}
for name, make in config.items():
    torch.manual_seed(0)
    kind = "ImageTextToText" if name in ("llava", "gemma3") else "CausalLM"
    build = getattr(transformers, f"AutoModelFor{kind}")
    model = halve(build.from_config(make()).eval())
    (model.base_model if name == "gpt2" else model).save_pretrained(root / name)
    renamed[name] = not load_file(root / name / "model.safetensors").keys() <= model.state_dict().keys()
    kinds = compact.pack(root / name, root / f"{name}-compact").kinds
    loaded = compact.load(root / f"{name}-compact")
    sparse = sum(isinstance(module, SparseLinear) for module in loaded.modules())
    assert sparse == sum(kind == "bitmask" for kind in kinds.values()) > 0, name
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5, name
    compact.unpack(root / f"{name}-compact", root / f"{name}-again")
    assert same_bytes(root / name, root / f"{name}-again"), name
assert [name for name in config if renamed[name]] == ["llava", "gemma3", "gpt2"]
model = load_model(str(root / "llava"))
report = prune_model(model, torch.arange(3, 67).view(4, 16), "0.75")
changed = pruned_parameters(model, report)
(root / "pruned").mkdir()
assert save_pruned(model, None, root / "llava", changed, root / "pruned")
before, after = (load_file(root / name / "model.safetensors") for name in ("llava", "pruned"))
assert before.keys() == after.keys()
assert sum(not torch.equal(tensor, after[name]) for name, tensor in before.items()) == len(changed) > 0
assert torch.equal(logits(load_model(str(root / "pruned"))), logits(model))
"""
_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.skipif(not can_convert(), reason="the other version is not 5")
def test_what_the_older_version_packs_both_load(tmp_path: Path) -> None:
    path = os.pathsep.join([str(OLDER), str(Path(__file__).parents[3])])
    command = [sys.executable, "-c", _OLDER, str(tmp_path), json.dumps(_SIZES)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("llava", "gemma3", "mixtral", "gpt2", "gpt_neox"):
        loaded: Any = compact.load(tmp_path / f"{name}-compact")
        assert any(isinstance(module, SparseLinear) for module in loaded.modules()), name
        want = logits(load_model(str(tmp_path / name)))
        assert torch.allclose(logits(loaded), want, atol=1e-5), name
