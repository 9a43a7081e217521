"""A pruned model is the same model in Transformers 4.57 and in version 5: perplexity, tokens and configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from thanos.prune import main

OLDER = Path(sys.prefix) / "transformers-4"
pytestmark = pytest.mark.skipif(
    not OLDER.is_dir(), reason="Transformers 4.57 is not beside the other packages: make test puts it there"
)

_MAKE = """
import json, sys, torch, transformers
for folder, (name, options) in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_file=sys.argv[2], **special).save_pretrained(folder)
"""
_SCORE = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
scores = {}
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("the quick brown fox jumps over the lazy dog " * 9)["input_ids"][:120]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    scores[folder] = [transformers.__version__, float(loss.double().exp()), ids[0].tolist()]
print(json.dumps(scores))
"""
_COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 100000.0, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


_MODELS = {
    "llama": ("Llama", _COMMON),
    "llama3": ("Llama", {**_COMMON, "rope_scaling": _LLAMA3}),
    "phi3": ("Phi3", _COMMON),
    "mixtral": ("Mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def run(script: str, *arguments: str, older: bool) -> dict[str, Any]:
    path = {"PYTHONPATH": str(OLDER)} if older else {}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def test_perplexity_is_the_same_in_both(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The sources are written by the older version; version 5 prunes them, and both read what comes out.

    Of families that both read alike: a dense Qwen2 of 4.57 has another perplexity in 5.23.
    """
    text = tmp_path / "text.txt"
    text.write_text("the dog sleeps in the sun and the fox jumps " * 60)
    tokens = str(tmp_path / "tokens.json")
    tiny_tokenizer.backend_tokenizer.save(tokens)
    run(_MAKE, json.dumps({str(tmp_path / name): made for name, made in _MODELS.items()}), tokens, older=True)
    for name in _MODELS:
        options = ["--calibration", str(text), "--samples", "4", "--sequence-length", "64"]
        done = CliRunner().invoke(main, [str(tmp_path / name), "--output", str(tmp_path / f"{name}-pruned"), *options])
        assert done.exit_code == 0, done.stderr
    pruned = [str(tmp_path / f"{name}-pruned") for name in _MODELS]
    dense = [str(tmp_path / name) for name in _MODELS]
    older, newer = run(_SCORE, *pruned, *dense, older=True), run(_SCORE, *pruned, older=False)
    for before, after in zip(dense, pruned, strict=True):
        assert older[after][0].startswith("4.57")
        assert not newer[after][0].startswith("4.")
        assert newer[after][1] == pytest.approx(older[after][1], rel=1e-5), after
        assert newer[after][2] == older[after][2], after
        assert abs(older[after][1] / older[before][1] - 1) > 1e-3, f"{after} is not pruned"
