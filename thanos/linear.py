"""What a linear layer is: ``nn.Linear``, and Transformers' ``Conv1D``, which keeps its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a ``Conv1D``, known by its class's name and fields, so that Transformers need not be imported."""
    return hasattr(module, "nf") and any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_plain(module: nn.Module) -> bool:
    """Whether it computes its product and nothing else: a subclass with a forward of its own may compute anything."""
    for kind in type(module).__mro__:
        if kind is nn.Linear or kind.__name__ == "Conv1D":
            own, usual = type(module).forward, vars(kind).get("forward")
            return is_linear(module) and own is usual
    return False


def weight_of(module: nn.Module) -> Tensor:
    """(c, b), out features x in features: a view of the parameter's memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_transposed(module) else weight.detach()
