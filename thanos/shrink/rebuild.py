"""Cut a model's parameters and build the smaller model from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thanos.shrink.structure import Site
from thanos.walk.replay import run_model

PROBE = 16  # tokens of the last check
Kept = Mapping[int, Mapping[tuple[str, int], Tensor]]
"""Of each block the parameters that are cut, by name and axis, with the slices that stay."""


def kept_slices(site: Site, units: Tensor) -> dict[tuple[str, int], Tensor]:
    """By parameter and axis of a site's cuts: the indices of the slices that stay with ``units`` (units,), bool."""
    return {(cut.parameter, cut.axis): site.kept(cut, units).nonzero()[:, 0] for cut in site.cuts}


def cut_tensors(
    tensors: Mapping[str, Tensor], prefix: str, blocks: tuple[int, ...], kept: Kept, *, shapes_only: bool = False
) -> dict[str, Tensor]:
    """A model's tensors without what was removed, under the names of the smaller model.

    Args:
        tensors: by name, as ``state_dict`` gives them.
        prefix: of the blocks' names, such as ``model.layers``.
        blocks: the old numbers of the blocks that stay.
        kept: by old number of a block.
        shapes_only: give tensors on the meta device.
    """
    number = {old: new for new, old in enumerate(blocks)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.to("meta") if shapes_only else tensor
        if not name.startswith(f"{prefix}."):
            found[name] = value
            continue
        old, _, own = name.removeprefix(f"{prefix}.").partition(".")
        if int(old) not in number:
            continue
        for (parameter, axis), slices in kept.get(int(old), {}).items():
            if parameter == own:
                value = value.index_select(axis, slices.to(value.device))
        found[f"{prefix}.{number[int(old)]}.{own}"] = value
    return found


def rebuilt(model: Any, config: Any, tensors: dict[str, Tensor]) -> Any:
    """A model of ``config`` made of ``tensors``, with the dtype, device and generation settings of ``model``."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    smaller = type(model).from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype)
    smaller = smaller.to(model.device).train(model.training)
    if getattr(model, "generation_config", None) is not None:
        smaller.generation_config = model.generation_config
    return smaller


def check_same(wanted: Tensor, smaller: nn.Module, samples: Tensor) -> None:
    """Compare the logits of the smaller model on the first tokens with those ``wanted`` of the masked one.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    with torch.no_grad():
        compare(wanted, run_model(smaller, samples[:1, :PROBE]).logits, smaller)


def compare(wanted: Tensor, found: Tensor, smaller: Any) -> None:
    """Raise RuntimeError where logits ``found`` of a smaller model differ by more than rounding from the ``wanted``."""
    wanted, found = wanted.to(found.device).float(), found.float()
    tolerance = 1e-3 if smaller.dtype in (torch.float32, torch.float64) else 0.1
    if not bool((wanted - found).norm() <= tolerance * wanted.norm()):
        raise RuntimeError(
            f"the smaller {type(smaller).__name__} does not compute what the masked one does: its code derives more "
            "from its configuration than the shapes; it cannot be made smaller this way"
        )
