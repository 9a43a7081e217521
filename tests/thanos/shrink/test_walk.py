"""The walk: which importance decides, how blocks are adjusted, and what a block's output is once it is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import thanos.shrink.job as job
from thanos.pattern import IMPORTANCES
from thanos.shrink import shrink_model
from thanos.shrink.probe import probe_sites
from thanos.walk.decoder import find_decoder

Tiny = Callable[..., Any]


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randint(3, 96, (16, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("pattern", ["channels:0.5", "heads:0.5", "kv-heads:1"])
def test_every_importance_chooses_channels_and_heads(
    tiny_model: Tiny, samples: torch.Tensor, pattern: str, importance: str
) -> None:
    """Units that are silent, or that nobody reads, go first whichever importance decides; the logits do not change."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 1::2] = 0
            layer.self_attn.o_proj.weight[:, 16:] = 0  # heads 2 and 3, of the second group
            if pattern == "heads:0.5":
                layer.self_attn.o_proj.weight[:, 8:24] = layer.self_attn.o_proj.weight[:, 8:24].flip(1) * 0
                layer.self_attn.o_proj.weight[:, 24:] = 1
        wanted = model(samples).logits
        smaller = shrink_model(model, samples, pattern, multiple=4, importance=importance).model
        torch.testing.assert_close(smaller(samples).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "factor"),
    [("llama", 1.0), ("gpt2", 1.0), ("phi", 1.0), ("granite", 0.25), ("gemma2", None), ("olmo2", None)],
)
def test_a_layer_whose_output_is_added_to_the_block_s(
    tiny_model: Tiny, samples: torch.Tensor, family: str, factor: float | None
) -> None:
    """A block that ends in a norm is no sum; one that scales what it adds says by how much."""
    if family == "granite":
        import transformers
        from conftest import FAMILIES

        config = transformers.GraniteConfig(**FAMILIES["llama"][1], residual_multiplier=0.25)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family)
    for sites in probe_sites(model, find_decoder(model), samples):
        assert sites.channels is not None
        assert sites.channels.adds == (None if factor is None else pytest.approx(factor, abs=1e-5))
        if sites.heads is not None and family != "phi":
            assert sites.heads.adds is None  # the feed-forward reads it too


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_blocks_need_not_run_again_once_they_are_cut(
    tiny_model: Tiny, samples: torch.Tensor, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without memory for what a layer was given, the same model comes out."""
    runs = {True: 0, False: 0}

    def shrunk(room: bool) -> Any:
        with monkeypatch.context() as patch:
            if not room:
                patch.setattr(job.Job, "_adds", lambda *_: None)
            model = tiny_model(family)
            block = find_decoder(model).blocks[1]

            def count(*_: Any) -> None:
                runs[room] += 1

            block.register_forward_hook(count)
            return shrink_model(model, samples, "channels:0.25", multiple=4).model.eval()

    with torch.no_grad():
        found, wanted = (shrunk(room)(samples).logits for room in (True, False))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert runs[True] == runs[False] - (0 if family == "gemma2" else 1)


def test_reconstruction_brings_blocks_nearer_to_the_dense_model_s(tiny_model: Tiny, samples: torch.Tensor) -> None:
    """Each block's held-out error falls or stays; what was cut stays cut, and the model is ordinary."""
    shrunk = shrink_model(tiny_model("llama"), samples, "channels:0.5+heads:0.5", multiple=4, reconstruct=3)
    blocks = shrunk.report.blocks
    assert [block.block for block in blocks] == [0, 1, 2]
    assert all(block.after <= block.before for block in blocks)
    assert any(block.after < 0.99 * block.before for block in blocks)
    assert (shrunk.model.config.intermediate_size, shrunk.model.config.num_attention_heads) == (24, 2)
    plain = shrink_model(tiny_model("llama"), samples, "channels:0.5+heads:0.5", multiple=4)
    assert plain.report.blocks == []
    with torch.no_grad():
        wanted = tiny_model("llama")(samples).logits
        errors = [float((one.model(samples).logits - wanted).square().sum()) for one in (shrunk, plain)]
    assert errors[0] < errors[1]


def test_depth_goes_first_and_what_stays_is_reconstructed(tiny_model: Tiny, samples: torch.Tensor) -> None:
    shrunk = shrink_model(tiny_model("llama"), samples, "channels:0.5+depth:1", multiple=4, reconstruct=1)
    assert len(shrunk.report.blocks) == shrunk.model.config.num_hidden_layers == 2
