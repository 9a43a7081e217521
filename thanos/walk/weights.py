"""Weights that are not a plain parameter of one linear layer: which are left dense and why, and which are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from thanos.linear import is_linear, is_transposed

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # what quantised weights are kept in
_SHARE = 0.05  # of a module's bytes: fewer integers than that are tables and counters
_CLOSE = 0.02  # relative to the product
_ADAPTERS = {"lora_a", "lora_b", "lora_down", "lora_up"}  # what modules of low-rank adapters are called


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model with PEFT's adapters: pruning beside them would not be what is merged later."""
    for name, module in model.named_modules():
        ours = (name, *type(module).__module__.split("."))
        if "peft" in ours[1:2] or (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
            where = f" ({name} is a {type(module).__name__})" if name else ""
            raise ValueError(
                f"{type(model).__name__} has adapters of PEFT{where}; merge them first, with merge_and_unload(), and "
                "prune the model that it returns"
            )


def refuse_quantised(model: nn.Module) -> None:
    """Raise ValueError, naming the tensor, where a module of the model keeps a weight in integers or in 8 bits."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("thanos.compact"):
            raise ValueError(
                f"{name} is a compact layer; restore the ordinary checkpoint with thanos.unpack, prune that"
            )
        packed = [(own, tensor) for own, tensor in module.named_parameters(recurse=False) if _is_packed(tensor)]
        for own, tensor in module.named_buffers(recurse=False):
            if _is_packed(tensor) and min(tensor.shape) > 1 and _is_much(tensor, module):
                packed.append((own, tensor))
        for own, tensor in packed:
            raise ValueError(
                f"{_join(name, own)} of {type(module).__name__} holds quantised weights ({tensor.dtype}); "
                "load the model in a floating dtype"
            )
        if is_linear(module) and (kind := _kind(getattr(module, "weight", None))):
            raise ValueError(f"{_join(name, 'weight')} is kept as {kind}; load the model in a floating dtype, dense")


def _is_packed(tensor: Tensor) -> bool:
    small = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.dim() > 1 and (small or tensor.dtype in _PACKED)


def _is_much(tensor: Tensor, module: nn.Module) -> bool:
    return tensor.nbytes > _SHARE * sum(held.nbytes for held in [*module.parameters(), *module.buffers()])


def _kind(weight: Any) -> str | None:
    """What a weight is that is no ordinary tensor, such as quantised or sparse ones that say they are floats."""
    if not isinstance(weight, nn.Parameter):
        return None
    inner = weight.data
    if type(inner) not in (Tensor, nn.Parameter):
        return type(inner).__name__
    return None if inner.layout == torch.strided else str(inner.layout)


def why_dense(name: str, module: nn.Module) -> str | None:
    """Why a linear layer stays dense whatever is asked for: None where its weight is a parameter and all that it holds.

    Args:
        name: its full name.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return f"its weight is computed{_source(module)}; make it a plain parameter first"
    if not weight.is_floating_point() or weight.dim() != 2:
        return f"its weight is no matrix of floating numbers, but {weight.dtype} {tuple(weight.shape)}"
    if any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
        return "its weight is an expanded tensor, several numbers of which are one in memory"
    if weight.numel() == 0:
        return "its weight is empty here, as where other processes hold it"
    if parts := [part for part in name.split(".") if part.lower() in _ADAPTERS]:
        return f"it belongs to an adapter, {parts[0]}"
    others = (own for own, _ in module.named_parameters() if own not in ("weight", "bias", "bias_orig"))
    if more := [own for own in others if not own.startswith("parametrizations.bias.")]:
        return f"its class {type(module).__name__} adds {', '.join(more[:3])} to the weight"
    if not _is_product(module, weight):
        return f"its class {type(module).__name__} does not compute the product of its weight and its input"
    return None


def _source(module: nn.Module) -> str:
    """By what a weight is computed, as far as the module shows it."""
    names = {own for own, _ in module.named_parameters(recurse=False)}
    if "parametrizations" in module._modules:
        kinds = [type(one).__name__ for one in module.parametrizations.weight]  # type: ignore[union-attr]
        return f" by the parametrisation {', '.join(kinds)} (torch.nn.utils.parametrize.remove_parametrizations)"
    if {"weight_g", "weight_v"} <= names:
        return " by weight_norm (torch.nn.utils.remove_weight_norm)"
    if "weight_orig" in names and hasattr(module, "weight_mask"):
        return " by torch.nn.utils.prune (torch.nn.utils.prune.remove)"
    return f" from {', '.join(sorted(names - {'bias'}))}" if names - {"bias"} else " elsewhere"


def _is_product(module: nn.Module, weight: Tensor) -> bool:
    """Whether a subclass with a forward of its own still computes the product, tried on one random input."""
    own = type(module).forward
    if own is nn.Linear.forward or is_transposed(module) or weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    inputs = inputs.to(weight)
    bias = module._parameters.get("bias")
    try:
        with torch.no_grad():
            found, expected = own(module, inputs), linear(inputs, weight, bias)
    except Exception:  # of a forward that wants other arguments
        return False
    if isinstance(found, tuple):
        found = found[0]
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    return bool((found - expected).norm() <= _CLOSE * expected.norm())


def shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Of named tensors, those whose memory another one's overlaps, with that other's name."""
    extents: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            first = int(tensor.storage_offset())
            last = int(first) + sum(
                (int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            extents.setdefault(tensor.untyped_storage()._cdata, []).append((first, last, name))
    return dict(pair for found in extents.values() for pair in _overlaps(sorted(found)))


def _overlaps(extents: list[tuple[int, int, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of names of (first, last, name), sorted by first, that overlap."""
    end, widest = -1, ""
    for first, last, name in extents:
        if widest and first <= end:
            yield name, widest
            yield widest, name
        if last > end:
            end, widest = last, name


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
