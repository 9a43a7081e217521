"""What cannot be made smaller is refused in one sentence, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thanos.shrink import shrink_model

Tiny = Callable[..., Any]


def refused(model: Any, samples: torch.Tensor, pattern: str, match: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        shrink_model(model, samples, pattern, **{"multiple": 4, **options})
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if tensor.isfinite().all())


@pytest.mark.parametrize("pattern", ["channels:0.25", "heads:0.5", "depth:1", "channels:0.25+depth:1"])
def test_feed_forwards_that_blocks_share(tiny_model: Tiny, token_samples: torch.Tensor, pattern: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    refused(model, token_samples, pattern, r"it shares its weight with model.layers.1.mlp.gate_proj")


def test_projections_that_share_a_weight(tiny_model: Tiny, token_samples: torch.Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[1].mlp.up_proj.weight
    refused(model, token_samples, "channels:0.25", r"layers.1.mlp.gate_proj .* shares its weight with .*up_proj")


def test_a_block_that_is_listed_twice(tiny_model: Tiny, token_samples: torch.Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    refused(model, token_samples, "depth:1", "lists the same block at 0 and at 1")


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("channels:0.25", "have 40, 48 channels; only models with one width"),
        ("depth:1", "cannot say 2 blocks: model.layers.0.mlp.down_proj.weight would be 32 x 48, not 32 x 40"),
        ("heads:0.5", r"cannot say 2 query heads .* would be 32 x 48, not 32 x 40"),
    ],
)
def test_widths_that_differ_between_blocks(
    tiny_model: Tiny, token_samples: torch.Tensor, pattern: str, match: str
) -> None:
    """As another tool left them, which no configuration says."""
    model = tiny_model("llama")
    own = model.model.layers[0].mlp
    own.gate_proj, own.up_proj = nn.Linear(32, 40, bias=False), nn.Linear(32, 40, bias=False)
    own.down_proj = nn.Linear(40, 32, bias=False)
    refused(model, token_samples, pattern, match)


def test_heads_that_differ_between_blocks(tiny_model: Tiny, token_samples: torch.Tensor) -> None:
    model = tiny_model("llama")
    own = model.model.layers[0].self_attn
    own.q_proj, own.o_proj = nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)
    own.k_proj, own.v_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    refused(model, token_samples, "channels:0.25", "k_proj.weight would be 16 x 32, not 8 x 32")
    refused(model, token_samples, "heads:0.5", "heads cannot be removed from LlamaForCausalLM")


@pytest.mark.parametrize(
    ("pattern", "widths"),
    [
        ("channels:0.25", (28, 3, 1, 3)),
        ("heads:1", (37, 2, 1, 3)),
        ("channels:0.25+heads:1+depth:1", (28, 2, 1, 2)),
    ],
)
def test_a_model_of_odd_sizes_goes_on_shrinking(
    tiny_model: Tiny, token_samples: torch.Tensor, pattern: str, widths: tuple[int, ...]
) -> None:
    odd = {"hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = tiny_model("llama", **odd, head_dim=6)
    config = shrink_model(model, token_samples, pattern, multiple=4).model.config
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert tuple(getattr(config, name) for name in names) == widths
    assert config.head_dim == 6


def test_odd_sizes_that_cannot_go_on(tiny_model: Tiny, token_samples: torch.Tensor) -> None:
    odd = {"hidden_size": 30, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1}
    refused(tiny_model("llama", **odd, head_dim=6), token_samples, "kv-heads:1", "leaves none of 3 heads")
    wide = {"multiple": 64}
    refused(
        tiny_model("llama", intermediate_size=60), token_samples, "channels:0.05", "removes no channel of 60", **wide
    )
    refused(tiny_model("llama"), token_samples, "channels:0.25", "removes no channel of 48", **wide)


@pytest.mark.parametrize("importance", ["wanda", "magnitude", "fisher", "forward"])
def test_an_importance_that_no_axis_takes(tiny_model: Tiny, token_samples: torch.Tensor, importance: str) -> None:
    refused(tiny_model("llama"), token_samples, "depth:1", "decides on channels, heads and", importance=importance)
    if importance != "forward":
        refused(
            tiny_model("llama"), token_samples, "experts:0.5", f"REAP's score .* not by {importance}",
            importance=importance,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reconstruct": -1}, "reconstruct must be at least 0"),
        ({"reconstruct": 1.5}, "reconstruct must be a whole number"),
        ({"importance": "nosuch"}, "none of obs"),
        ({"multiple": 0}, "multiple must be at least 1"),
        ({"correction": 2.0}, "correction must be from 0 to 1"),
        ({"damping": float("nan")}, "damping must be at least 0"),
    ],
)
def test_options_that_suit_no_model(
    tiny_model: Tiny, token_samples: torch.Tensor, options: dict[str, Any], match: str
) -> None:
    refused(tiny_model("llama"), token_samples, "channels:0.25", match, **options)


@pytest.mark.parametrize("options", [{"reconstruct": 1}, {"correction": 0.5}])
@pytest.mark.parametrize("pattern", ["depth:1", "depth:1@2", "experts:0.5"])
def test_adjusting_blocks_that_are_not_cut(
    tiny_model: Tiny, token_samples: torch.Tensor, pattern: str, options: dict[str, Any]
) -> None:
    refused(tiny_model("llama"), token_samples, pattern, "leaves every layer's width as it is", **options)


def test_numbers_that_are_none(tiny_model: Tiny, token_samples: torch.Tensor) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    refused(model, token_samples, "channels:0.25", "layers.1.mlp.up_proj: its weights hold NaN or infinity")
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: its block's output holds NaN or infinity"):
        shrink_model(model, token_samples, "channels:0.25", multiple=4)
