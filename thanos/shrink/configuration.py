"""The configuration of a smaller model, and the proof that it says what is meant: an empty model built from it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Shape:
    """What is to be said of the smaller model; None leaves a number as it is.

    Attributes:
        width: (old, new) channels of the feed-forwards.
        heads: query heads, key and value heads, and channels in each.
        blocks: the old numbers of the blocks that stay, in their order.
        experts: (old, new) experts of each mixture.
        experts_per_token: of them, how many a token goes to.
    """

    width: tuple[int, int] | None = None
    heads: tuple[int, int, int] | None = None
    blocks: tuple[int, ...] | None = None
    experts: tuple[int, int] | None = None
    experts_per_token: int | None = None


def smaller_config(model: nn.Module, shape: Shape, expected: Shapes) -> Any:
    """The configuration of a model of ``shape`` whose parameters have the ``expected`` shapes.

    Raises:
        ValueError: no configuration of this kind says so.
    """
    problem = "it holds no such number"
    for config in _candidates(model.config, shape):
        try:
            read = type(config).from_dict(config.to_dict())  # as from_pretrained will
            built = _empty(type(model), read)
        except Exception as error:  # whatever the model's code raises
            problem = _last_line(error)
            continue
        shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
        if shapes == dict(expected):
            return config
        problem = _difference(shapes, expected)
    raise ValueError(f"the configuration of {type(model).__name__} cannot say {describe(shape)}: {problem}")


def describe(shape: Shape) -> str:
    """What is smaller, in words."""
    words = []
    if shape.width:
        words.append(f"feed-forwards of {shape.width[1]} channels")
    if shape.heads:
        words.append(
            f"{shape.heads[0]} query heads and {shape.heads[1]} key and value heads of {shape.heads[2]} channels"
        )
    if shape.blocks is not None:
        words.append(f"{len(shape.blocks)} blocks")
    if shape.experts:
        words.append(f"{shape.experts[1]} experts")
    return " with ".join(words)


def _difference(found: Shapes, expected: Shapes) -> str:
    """The first parameter that a model built from a configuration has otherwise."""
    names = sorted({*found, *expected}, key=lambda name: (name not in found or name not in expected, name))
    name = next(name for name in names if found.get(name) != expected.get(name))
    has, wanted = (" x ".join(map(str, shapes[name])) if name in shapes else "absent" for shapes in (found, expected))
    return f"{name} would be {has}, not {wanted}"


def _last_line(error: Exception) -> str:
    """What transformers' validators say, without their own preface."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("ValueError: ").rstrip(".!")


def _empty(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind._from_config(config)


def _candidates(config: Any, shape: Shape) -> Iterator[Any]:
    """Configurations that may say the shape, the likeliest first: which attribute holds a number is found by trying."""
    text = config.get_text_config()
    widths: list[str | None] = [None] if shape.width is None else [*_holding(text, shape.width[0], _WIDTH_WORDS)]
    experts: list[str | None] = [None] if shape.experts is None else [*_holding(text, shape.experts[0], ("expert",))]
    for width in widths:
        for expert in experts:
            changed = copy.deepcopy(config)
            text = changed.get_text_config()
            try:
                if width is not None and shape.width:
                    setattr(text, width, shape.width[1])
                if expert is not None and shape.experts:
                    setattr(text, expert, shape.experts[1])
                    _set_experts_per_token(text, shape)
                if shape.heads:
                    _set_heads(text, *shape.heads)
                if shape.blocks is not None:
                    _keep_blocks(text, shape.blocks)
            except (AttributeError, TypeError, ValueError):
                continue
            yield changed


_WIDTH_WORDS = ("intermediate", "ffn", "inner", "mlp", "ff")


def _holding(config: Any, value: int, words: tuple[str, ...]) -> list[str]:
    """Attributes that hold ``value``, or None under a name of the kind, those of such a name first."""
    names = [name for name in config.to_dict() if not name.startswith("_")]
    fits = [name for name in names if type(getattr(config, name, None)) is int and getattr(config, name) == value]
    named = [name for name in fits if any(word in name for word in words)]
    unset = [name for name in names if getattr(config, name, 0) is None and any(word in name for word in words)]
    return [*named, *unset]


def _set_heads(config: Any, heads: int, key_value_heads: int, size: int) -> None:
    config.num_attention_heads = heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(config, name, key_value_heads)
    if getattr(config, "head_dim", None) != size:
        config.head_dim = size


def _set_experts_per_token(config: Any, shape: Shape) -> None:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"):
        if shape.experts_per_token is not None and getattr(config, name, None) is not None:
            setattr(config, name, shape.experts_per_token)


def _keep_blocks(config: Any, blocks: tuple[int, ...]) -> None:
    """Every list of one entry a block follows its blocks."""
    before = config.num_hidden_layers
    lists = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == before and not name.startswith("_")
    }
    config.num_hidden_layers = len(blocks)
    for name, value in lists.items():
        setattr(config, name, [value[index] for index in blocks])
