"""Every family that is pruned is packed, loaded and unpacked, experts one by one where the checkpoint has them so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.conftest import FAMILIES
from tests.marks import fuses
from tests.mixtures import FUSED, MIXTURES, tiny_mixture
from tests.thanos.walk.test_weights import UNUSUAL, tiny_unusual
from thanos import compact
from thanos.checkpoint import can_convert, load_model
from thanos.compact.base import SparseLinear
from thanos.compact.experts import SparseExperts

TOKENS = torch.arange(3, 35, dtype=torch.int64, device="cpu").view(2, 16)
Tiny = Callable[..., Any]


def logits(model: Any, **options: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(TOKENS, **options).logits
    return result.float()


def halve(model: Any) -> Any:
    """The model with half of every matrix zero, single experts' too."""
    draw = torch.Generator("cpu").manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            if not bool(parameter.any()):  # scales that start at zero
                nn.init.normal_(parameter, std=0.1)
            parameter.data *= torch.rand(parameter.shape, generator=draw, dtype=torch.float32, device="cpu") < 0.5
    return model


def same_bytes(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


def packed(model: Any, folder: Path, **options: Any) -> compact.Packed:
    model.save_pretrained(folder / "pruned", **options)
    return compact.pack(folder / "pruned", folder / "compact")


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES, *UNUSUAL])
def test_a_family_is_packed_loaded_and_unpacked(family: str, tiny_model: Tiny, tmp_path: Path) -> None:
    make = tiny_mixture if family in MIXTURES else tiny_unusual if family in UNUSUAL else tiny_model
    try:
        model = halve(make(family))
    except AttributeError:
        pytest.skip(f"this version of Transformers has no {family}")
    if family == "zamba2" and not can_convert():
        pytest.skip("Transformers 4 cannot save its shared weights")
    done = packed(model, tmp_path)
    kinds = set(done.kinds.values())
    assert kinds & {"bitmask", "sparse24", "columns"}
    loaded = compact.load(tmp_path / "compact")
    sparse = [module for module in loaded.modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == sum(kind not in ("dense", "fused") for kind in done.kinds.values())
    want, have = logits(load_model(str(tmp_path / "pruned"))), logits(loaded)
    assert (have - want).abs().max() <= 1e-5 * want.abs().max()
    if family in MIXTURES and can_convert():
        assert ("fused" in kinds) is (family in FUSED)
        assert any(isinstance(module, SparseExperts) for module in loaded.modules()) is (family not in FUSED)
    plain = type(loaded).from_pretrained(tmp_path / "compact", dtype="auto")
    assert torch.equal(logits(plain), logits(loaded))
    assert [type(module) for module in plain.modules()] == [type(module) for module in loaded.modules()]
    compact.unpack(tmp_path / "compact", tmp_path / "restored")
    assert same_bytes(tmp_path / "pruned", tmp_path / "restored")
    for model in (loaded, plain):
        model.save_pretrained(tmp_path / "again")
        assert same_bytes(tmp_path / "compact", tmp_path / "again")


@fuses
def test_an_expert_is_read_for_its_tokens_alone(tmp_path: Path) -> None:
    packed(halve(tiny_mixture("mixtral")), tmp_path)
    loaded = compact.load(tmp_path / "compact")
    experts = next(module for module in loaded.modules() if isinstance(module, SparseExperts))
    counts: dict[str, int] = {}
    for name, layer in experts.named_modules():
        if isinstance(layer, SparseLinear):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: counts.update({name: len(inputs[0])})  # type: ignore[misc]
            )
    index = torch.tensor([[0, 2], [2, 0], [2, 4]], dtype=torch.int64, device="cpu")  # 4 is the mark of no expert
    weights = torch.full((3, 2), 0.5, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        result = experts(torch.randn(3, 32), index, weights)
        assert not experts(torch.randn(3, 32), index * 0 + 4, weights).any()
    assert result.shape == (3, 32)
    assert counts == {f"{expert}.{part}": n for expert, n in ((0, 2), (2, 3)) for part in ("w1", "w2", "w3")}


@pytest.mark.skipif(not can_convert(), reason="this version of Transformers keeps experts apart")
def test_experts_that_stay_dense_stand_beside_sparse_ones(tmp_path: Path) -> None:
    model = tiny_mixture("qwen3_moe")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    fused.data[1, :24] *= torch.rand(24, 32) < 0.4
    done = packed(model, tmp_path, max_shard_size="20KB")
    assert [name for name, kind in done.kinds.items() if kind == "bitmask"] == [
        "model.layers.0.mlp.experts.1.gate_proj"
    ]
    loaded = compact.load(tmp_path / "compact")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-6)
    assert isinstance(loaded.model.layers[0].mlp.experts, SparseExperts)
    assert not isinstance(loaded.model.layers[1].mlp.experts, SparseExperts)
    loaded.model.layers[0].mlp.experts.get_submodule("2.up_proj").weight.data.zero_()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(compact.load(tmp_path / "again")), logits(loaded))


def test_a_compact_mixture_compiles_and_takes_autocast(tmp_path: Path) -> None:
    packed(halve(tiny_mixture("mixtral", num_hidden_layers=1)), tmp_path)
    model, pruned = compact.load(tmp_path / "compact"), load_model(str(tmp_path / "pruned"))
    want = logits(pruned)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        for length in (3, 16):
            torch.testing.assert_close(compiled(TOKENS[:, :length]).logits, model(TOKENS[:, :length]).logits)
    with torch.autocast("cpu", torch.bfloat16):
        have, rounded = logits(model), logits(pruned)
    assert (have - rounded).norm() <= 0.03 * rounded.norm()
    assert (logits(model.double()) - want).abs().max() <= 1e-5 * want.abs().max()
    with pytest.raises(TypeError, match=r"not torch\.float8_e4m3fn: restore the dense model"):
        model.to(torch.float8_e4m3fn)


def test_a_checkpoint_of_the_base_model_is_packed(tiny_model: Tiny, tmp_path: Path) -> None:
    """Its tensors lack the prefix that they have in the model, as those of GPT-2 on the hub."""
    model = halve(tiny_model("gpt2"))
    model.transformer.save_pretrained(tmp_path / "pruned")
    done = compact.pack(tmp_path / "pruned", tmp_path / "compact")
    assert set(done.kinds.values()) == {"bitmask"}
    loaded = compact.load(tmp_path / "compact")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-6)
    compact.unpack(tmp_path / "compact", tmp_path / "restored")
    assert same_bytes(tmp_path / "pruned", tmp_path / "restored")


def test_a_multimodal_model_is_packed_whole(tmp_path: Path) -> None:
    text: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    vision = {**text, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    del vision["vocab_size"]
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=90,
    )  # fmt: skip
    torch.manual_seed(0)
    model = halve(transformers.AutoModelForImageTextToText.from_config(config).eval())
    packed(model, tmp_path)
    loaded = compact.load(tmp_path / "compact")
    assert type(loaded) is type(model)
    image = torch.rand((2, 3, 16, 16), generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float32)
    tokens = TOKENS.clone()
    tokens[:, :4] = 90
    with torch.inference_mode():
        have, want = (one(tokens, pixel_values=image).logits for one in (loaded, model))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)
    compact.unpack(tmp_path / "compact", tmp_path / "restored")
    assert same_bytes(tmp_path / "pruned", tmp_path / "restored")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = halve(tiny_mixture("mixtral"))
    model.save_pretrained(tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    held = load_file(file)
    del held["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(gate_up_proj|experts\.2\.w1)"):
        compact.pack(tmp_path / "pruned", tmp_path / "compact")
    assert not (tmp_path / "compact").exists()
