"""Saving is all or nothing; reading refuses in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from thanos.checkpoint import check_target, load_config, load_model, load_tokenizer, max_length, staged


def test_target_appears_at_the_end_with_everything(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
        assert folder.parent == target.parent
    assert sorted(os.listdir(target.parent)) == ["target"]
    assert os.listdir(target) == ["config.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with staged(tmp_path / "target") as folder:
            (folder / "config.json").write_text("{}")
            raise error

    with pytest.raises(error):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_overwriting_replaces_everything_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged(target) as folder:
        (folder / "config.json").write_text("old")
        (folder / "old.bin").touch()

    def interrupted() -> None:
        with staged(target, overwrite=True):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert (target / "config.json").read_text() == "old"
    with staged(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["config.json"]


def test_targets_that_cannot_be_written_are_refused_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    before = sorted(tmp_path.rglob("*"))
    for name, overwrite, match in [
        ("model", False, "exists"),
        ("photos", True, "does not hold a model"),
        ("file", True, "not a directory"),
        ("file/below", False, "cannot write"),
        ("model", True, "is the model itself"),
    ]:
        with pytest.raises(ValueError, match=match):
            check_target(
                tmp_path / name, overwrite=overwrite, source=str(tmp_path / "model") if "itself" in match else None
            )
    check_target(tmp_path / "not" / "yet", overwrite=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_model_loads_in_its_own_dtype_or_the_one_asked_for(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.bfloat16
    model = load_model(str(tmp_path), torch.float32)
    assert model.dtype == torch.float32
    assert not model.training
    assert max_length(model.config) == 64


@pytest.mark.parametrize(
    ("files", "name", "match"),
    [
        ({}, "none", "no model directory"),
        ({"model.bin": "x"}, "", "holds no config.json"),
        ({"config.json": "{oops"}, "", "cannot read the model"),
        ({"config.json": "{}"}, "", "cannot read the model"),
        ({}, "none.gguf", "no GGUF file"),
        ({"bad.gguf": "no gguf at all"}, "bad.gguf", "cannot read the model|not installed"),
    ],
)
def test_unreadable_models_are_refused(tmp_path: Path, files: dict[str, str], name: str, match: str) -> None:
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match) as caught:
        load_model(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_models_that_are_no_decoders_are_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="no causal language model"):
        load_config(str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="encoder-decoder"):
        load_config(str(tmp_path / "t5"))


def test_missing_weights_and_tokenizer_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    for read in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"cannot read the (model|tokenizer of)|package that is not installed"):
            read(str(tmp_path))


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 34,
}


@pytest.mark.parametrize(
    ("family", "options", "limit"),
    [
        ("Llama", {**_SMALL, "pad_token_id": 0}, 34),
        ("Bert", {**_SMALL, "is_decoder": True}, 34),
        ("Roberta", {**_SMALL, "is_decoder": True}, 32),
        ("Camembert", {**_SMALL, "is_decoder": True, "pad_token_id": 3}, 30),
        ("XLMRobertaXL", {**_SMALL, "is_decoder": True}, 32),
        ("Data2VecText", {**_SMALL, "is_decoder": True}, 32),
        ("BioGpt", _SMALL, 34),
        ("OPT", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, 34),
        ("XGLM", {"vocab_size": 96, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}, 2048),
        ("GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 34}, 34),
        ("GPTNeo", {**_SMALL, "num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4}, 34),
        ("CTRL", {"vocab_size": 96, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 34}, 34),
        ("Mpt", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 34}, 34),
        ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
        ("Mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}, None),
        ("XLNet", {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, None),
    ],
)
def test_the_longest_sequence_is_one_that_the_model_takes(
    family: str, options: dict[str, Any], limit: int | None
) -> None:
    config = getattr(transformers, f"{family}Config")(**{"bos_token_id": 0, "eos_token_id": 2, **options})
    assert max_length(config) == limit
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(4, 96, (1, limit or 50))
    with torch.no_grad():
        assert bool(model(tokens).logits.isfinite().all())
    if limit not in (None, 2048) and family != "Llama":  # rotary positions go on
        longer = torch.randint(4, 96, (1, limit + 1))
        with pytest.raises((IndexError, RuntimeError, ValueError)), torch.no_grad():
            model(longer)


def test_the_longest_sequence_depends_on_no_state_and_changes_none() -> None:
    config = transformers.RobertaConfig(**_SMALL, is_decoder=True)
    before, state = config.to_dict(), torch.get_rng_state()
    assert max_length(config) == 32
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        assert max_length(config) == 32
