"""What a linear layer is: ``nn.Linear``, and Transformers' ``Conv1D``, which keeps its weight transposed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a ``Conv1D``, known by its class's name and fields, so that Transformers need not be imported."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_plain(module: nn.Module) -> bool:
    """Whether it computes its product and nothing else.

    A subclass with a forward of its own may compute anything; one like Falcon's, which writes the same product in other
    words, is known by what it gives for a small weight.
    """
    for kind in type(module).__mro__:
        if kind is nn.Linear or kind.__name__ == "Conv1D":
            own, usual = type(module).forward, vars(kind).get("forward")
            return is_linear(module) and (own is usual or (kind is nn.Linear and _gives_the_product(module)))
    return False


def _gives_the_product(module: nn.Module) -> bool:
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return False
    exact: Any = {"dtype": torch.float64, "device": "cpu"}
    draw = torch.Generator("cpu").manual_seed(0)
    weight, bias, inputs = (torch.randn(*shape, generator=draw, **exact) for shape in ((5, 7), (5,), (2, 3, 7)))
    small = copy.copy(module)
    has_bias = module._parameters["bias"] is not None
    small._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias) if has_bias else None}
    try:
        with torch.no_grad():
            found = small.forward(inputs)
    except Exception:  # of a forward that is something else
        return False
    wanted = nn.functional.linear(inputs, weight, bias if has_bias else None)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted)


def weight_of(module: nn.Module) -> Tensor:
    """(c, b), out features x in features: a view of the parameter's memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(module) else weight.detach()
