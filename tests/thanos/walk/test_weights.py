"""Weights that are not plain parameters: left dense with a true reason, or refused by name before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.marks import modes_see_flex_attention, replays
from thanos import prune_model
from thanos.walk.decoder import find_decoder
from thanos.walk.memory import PeakMemory

NAME = "model.layers.1.mlp.down_proj"
Tiny = Callable[..., Any]


def own_parameter(linear: nn.Linear) -> nn.Module:
    """Low-rank adapters written by hand, as a subclass of the linear layer."""

    class Adapted(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + inputs @ self.down.T @ self.up.T

    linear.__class__ = Adapted
    linear.down = nn.Parameter(torch.randn(2, linear.in_features))
    linear.up = nn.Parameter(torch.zeros(linear.out_features, 2))
    return linear


def another_forward(linear: nn.Linear) -> nn.Module:
    class Ternary(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight.sign(), self.bias)

    linear.__class__ = Ternary
    return linear


def expanded(linear: nn.Linear) -> nn.Module:
    row = torch.randn(1, linear.in_features)
    linear.weight = nn.Parameter(row.expand(linear.out_features, linear.in_features))
    return linear


COMPUTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "weight_norm": (parametrizations.weight_norm, "computed by the parametrisation _WeightNorm"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrisation _SpectralNorm"),
    "old_weight_norm": (weight_norm, "computed by weight_norm"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), r"torch\.nn\.utils\.prune\.remove"),
    "parameter": (own_parameter, "Adapted adds down, up"),
    "expanded": (expanded, "several numbers of which are one in memory"),
    "forward": (another_forward, "Ternary does not compute the product"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_stay_dense_and_are_counted(
    kind: str, passes: int, tiny_model: Tiny, token_samples: Tensor
) -> None:
    model = tiny_model("llama")
    make, reason = COMPUTED[kind]
    make(model.get_submodule(NAME))
    before = {name: value.clone() for name, value in model.get_submodule(NAME).state_dict().items()}
    report = prune_model(model, token_samples, "0.5", passes=passes)
    assert list(report.dense) == [NAME]
    assert re.search(reason, report.dense[NAME])
    for name, value in model.get_submodule(NAME).state_dict().items():
        assert name.endswith(("_u", "_v")) or torch.equal(value, before[name])
    parameters = [one for one in model.get_submodule(NAME).parameters() if one.dim() > 1 and min(one.shape) > 1]
    kept = sum(one.numel() for one in parameters)
    zeros = sum(int((one == 0).sum()) for one in parameters)
    total = sum(shape[0] * shape[1] for shape in (entry.shape for entry in report.layers)) + kept
    assert report.effective_sparsity == pytest.approx((0.5 * (total - kept) + zeros) / total)


@pytest.mark.parametrize("how", ["pruned", "parametrised"])
def test_a_computed_bias_leaves_the_weight_to_be_pruned(how: str, tiny_model: Tiny, token_samples: Tensor) -> None:
    model = tiny_model("llama", mlp_bias=True)
    linear = model.get_submodule(NAME)
    if how == "pruned":
        prune.random_unstructured(linear, "bias", 0.3)
    else:
        parametrize.register_parametrization(linear, "bias", nn.Tanh())
    report = prune_model(model, token_samples, "0.5")
    assert not report.dense
    assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2


def test_shared_weights_stay_dense(tiny_model: Tiny, token_samples: Tensor) -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # two modules, one parameter
    layers[2].mlp.down_proj = layers[1].mlp.down_proj  # one module in two blocks
    layers[0].self_attn.q_proj.weight = nn.Parameter(layers[0].mlp.gate_proj.weight.data[8:40])  # memory that overlaps
    report = prune_model(model, token_samples, "0.5")
    assert report.dense == {
        "model.layers.0.self_attn.q_proj": "it shares its weight with model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.gate_proj": "it shares its weight with model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj": "it shares its weight with model.layers.2.mlp.up_proj",
        "model.layers.1.mlp.down_proj": "it shares its weight with model.layers.2.mlp.down_proj",
        "model.layers.2.mlp.up_proj": "it shares its weight with model.layers.0.mlp.up_proj",
        "model.layers.2.mlp.down_proj": "it shares its weight with model.layers.1.mlp.down_proj",
    }
    assert not any(bool((model.get_submodule(name).weight == 0).any()) for name in report.dense)


def test_weights_tied_to_something_outside_the_blocks_stay_dense(tiny_model: Tiny, token_samples: Tensor) -> None:
    model = tiny_model("llama", vocab_size=48)
    model.model.layers[0].mlp.up_proj.weight = model.model.embed_tokens.weight
    report = prune_model(model, token_samples % 48, "0.5")
    assert report.dense == {"model.layers.0.mlp.up_proj": "it shares its weight with model.embed_tokens.weight"}


class Adapter(nn.Module):
    """What PEFT makes of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))


def test_adapters_are_to_be_merged_first(tiny_model: Tiny, token_samples: Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = Adapter(model.model.layers[1].mlp.down_proj)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapters of PEFT \(model\.layers\.1\.mlp\.down_proj.*merge_and_unload"):
        prune_model(model, token_samples, "0.5")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prompted = tiny_model("llama")
    prompted.__class__ = type("PeftModel", (type(prompted),), {"__module__": "peft.peft_model"})
    with pytest.raises(ValueError, match="merge_and_unload"):
        prune_model(prompted, token_samples, "0.5")


def test_adapters_of_other_makers_stay_dense(tiny_model: Tiny, token_samples: Tensor) -> None:
    class Other(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.linear = base
            self.lora_a = nn.Linear(base.in_features, 2, bias=False)
            self.lora_b = nn.Linear(2, base.out_features, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(inputs) + self.lora_b(self.lora_a(inputs))

    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = Other(model.model.layers[1].mlp.down_proj)
    report = prune_model(model, token_samples, "0.5")
    assert report.dense == {f"{NAME}.{part}": f"it belongs to an adapter, {part}" for part in ("lora_a", "lora_b")}


class Packed(nn.Module):
    """A quantised layer that is no ``nn.Linear``, as GPTQ and AWQ make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))


def eight_bits(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    return linear


def compressed(linear: nn.Linear) -> nn.Linear:
    del linear.weight
    linear.weight_packed = nn.Parameter(torch.zeros(32, 6, dtype=torch.int32), requires_grad=False)
    return linear


def sparse(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.data.to_sparse())
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Packed, "qweight of Packed holds quantised weights"),
        (eight_bits, "weight of Linear holds quantised weights"),
        (compressed, "weight_packed of Linear holds quantised weights"),
        (sparse, "kept as torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_quantised_weights_are_refused_by_name(
    make: Callable[[Any], nn.Module], reason: str, blocks: int, tiny_model: Tiny, token_samples: Tensor
) -> None:
    model = tiny_model("llama")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    for name in names if blocks == 3 else [NAME]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    with pytest.raises(ValueError, match=rf"(model\.layers.*{reason}).*floating dtype"):
        prune_model(model, token_samples, "0.5")


def test_a_model_whose_every_weight_is_computed_is_refused(tiny_model: Tiny, token_samples: Tensor) -> None:
    model = tiny_model("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            parametrizations.weight_norm(module)
    with pytest.raises(ValueError, match=r"no layer that can be pruned.*q_proj: its weight is computed"):
        prune_model(model, token_samples, "0.5")


@replays
def test_a_weight_used_without_its_layer_is_named_so(tiny_model: Tiny, token_samples: Tensor) -> None:
    report = prune_model(tiny_model("mamba"), token_samples, "0.5", block_size=16)
    reasons = {name: reason for name, reason in report.dense.items() if name.endswith("dt_proj")}
    assert len(reasons) == 3
    assert set(reasons.values()) == {"its weight is used without calling the layer, so its input is not seen"}


_TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "num_key_value_heads": 4, "num_hidden_layers": 5, "mamba_d_state": 4, "n_mamba_heads": 2,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"], "use_mamba_kernels": False,
}  # fmt: skip
UNUSUAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent_gemma": (
        "RecurrentGemma",
        {"lru_width": 32, "num_key_value_heads": 1, "attention_window_size": 16, "num_hidden_layers": 3},
        "RecurrentGemmaRglru, which is no linear layer",
    ),
    "zamba": ("Zamba", {**_MAMBA, "mamba_dt_rank": 4}, "shares its weight with"),
    "zamba2": (
        "Zamba2",
        {**_MAMBA, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8, "adapter_rank": 4},
        "shares its weight with",
    ),
    "gemma3n": (
        "Gemma3nText",
        {
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
        },
        "",  # its blocks pass on four dimensions, and keys and values through a dictionary
    ),
}  # fmt: skip


def tiny_unusual(family: str) -> Any:
    kind, options, _ = UNUSUAL[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_TINY, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@replays
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_blocks_are_pruned_as_far_as_they_can_be(family: str, passes: int, token_samples: Tensor) -> None:
    model, reason = tiny_unusual(family), UNUSUAL[family][2]
    for parameter in model.parameters():  # scales that start at zero would leave columns dead
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    report = prune_model(model, token_samples, "0.5", passes=passes, batch_size=4, block_size=16)
    assert report.layers
    assert not reason or any(reason in text for text in report.dense.values())
    layers = {layer.name: layer for block in find_decoder(model).layers for layer in block}
    for entry in report.layers:
        assert int((layers[entry.name].weight == 0).sum()) == layers[entry.name].weight.numel() // 2


def test_blocks_that_run_in_a_loop_are_refused_for_it(tiny_model: Tiny, token_samples: Tensor) -> None:
    class Looped(transformers.LlamaModel):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            hidden = self.embed_tokens(input_ids)
            tables = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
            for block in [*self.layers, *self.layers]:
                hidden = block(hidden, position_embeddings=tables)
            return (self.norm(hidden),)

    model = tiny_model("llama")
    model.model.__class__ = Looped
    with pytest.raises(ValueError, match="run more than once for a token, for instance block 0"):
        prune_model(model, token_samples, "0.5")
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(ValueError, match="lists the same block at 0 and at 2"):
        prune_model(model, token_samples, "0.5")


@modes_see_flex_attention
def test_memory_is_measured_through_operators_of_higher_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    query = torch.randn(1, 2, 16, 8)
    with PeakMemory() as memory, torch.no_grad():
        output = flex_attention.flex_attention(query, query, query)
    assert isinstance(output, Tensor)
    assert memory.peak >= output.nbytes


def test_memory_is_estimated_where_a_mode_is_not_allowed(
    tiny_model: Tiny, token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile refuses to work beneath a mode, so a compiled flex_attention does."""
    model = tiny_model("llama")
    attention = type(model.model.layers[0].self_attn)
    own = attention.forward

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("non-infra torch dispatch mode present")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", compiled)
    assert prune_model(model, token_samples, "0.5", memory_limit=1 << 30).passes == 1
    assert prune_model(model, token_samples, "0.5", memory_limit=1 << 10).passes == 2


def test_flex_attention_is_never_run_beneath_a_mode(
    tiny_model: Tiny, token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled, which a mode breaks for the rest of the process; here it is replaced by a plain product."""
    masks: list[str] = []

    def attention(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **__: Any) -> tuple[Tensor, None]:
        assert _get_current_dispatch_mode() is None
        masks.append(type(mask).__name__)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None

    monkeypatch.setitem(
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attention
    )
    expected = prune_model(tiny_model("llama"), token_samples, "0.5")
    model = tiny_model("llama")
    model.set_attn_implementation("flex_attention")
    report = prune_model(model, token_samples, "0.5")
    assert set(masks) == {"BlockMask"}
    assert report.passes == expected.passes
    for one, two in zip(expected.layers, report.layers, strict=True):
        assert one.relative_loss == pytest.approx(two.relative_loss, rel=1e-3)
