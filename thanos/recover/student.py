"""The model in training: float32 weights that are trained, and a frozen model that runs with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thanos.recover.loss import Reader, logit_losses, reader, token_losses
from thanos.walk.decoder import find_decoder

_LOW_RANK = ("/down", "/up")


def fast_dtype(device: torch.device, compute: str) -> torch.dtype:
    """The dtype of forwards and backwards: bfloat16 where it is asked for, or multiplied in hardware."""
    if compute != "auto":
        return torch.bfloat16 if compute == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def frozen(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of a model that runs in ``dtype`` and is not trained; its tables of positions stay as they are."""
    held: nn.Module = copy.deepcopy(model)
    held.requires_grad_(False).eval().to(device)
    for parameter in held.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return held


def trainable(model: Any, train: str) -> tuple[list[str], list[str]]:
    """The names of the parameters that hold the blocks' layers, and of the norms, biases and other vectors.

    Embeddings and output head, routers and what cannot be pruned stay as they are.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = {id(one) for one in head.parameters()} if head is not None else set()
    vectors = [
        name
        for name, one in model.named_parameters()
        if one.dim() == 1 and len(one) > 1 and one.is_floating_point() and id(one) not in outside
    ]
    if train == "norms":
        return [], vectors
    layers = [layer for block in find_decoder(model).layers for layer in block]
    return list(dict.fromkeys(layer.parameter_name for layer in layers)), vectors


class Student(nn.Module):
    """What is trained.

    Its parameters are the values in training, in float32; :meth:`effective` makes the model's parameters of them, and
    its forward runs a frozen copy of the model with these in place of its own.

    Args:
        model: the pruned model.
        train: see :data:`thanos.recover.options.TRAINED`.
        masks: of some parameters, what must be zero.
        teacher: the dense model; None without one.
        share: of the distance to it in the loss.
        rank, seed: of low-rank updates.
        dtype, device: of forwards and backwards.
    """

    def __init__(
        self,
        model: nn.Module,
        train: str,
        masks: Mapping[str, Tensor],
        *,
        teacher: nn.Module | None,
        share: float,
        rank: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        weights, vectors = trainable(model, train)
        exact: dict[str, Any] = {"dtype": torch.float32, "device": device}
        own = dict(model.named_parameters())
        direct = vectors if train == "lora" else [*weights, *vectors]
        self.values = {name: self._value(name, own[name].detach().to(**exact, copy=True)) for name in direct}
        self._gone = {name: mask.to(device) for name, mask in masks.items()}
        self._bases: dict[str, Tensor] = {}
        if train == "lora":
            self._add_low_rank(own, weights, rank, seed, exact)
        working = frozen(model, dtype, device)
        # In a tuple, so that the trainer neither saves nor counts what is not trained.
        self._held = (reader(working), None if teacher is None else reader(frozen(teacher, dtype, device)))
        self._inner = _names_inside(working, self._held[0], self.names)
        self._dtype, self._share = dtype, 0.0 if teacher is None else share

    def _value(self, name: str, start: Tensor) -> nn.Parameter:
        value = nn.Parameter(start)
        self.register_parameter(name.replace(".", "/"), value)
        return value

    def _add_low_rank(
        self, own: Mapping[str, Tensor], weights: list[str], rank: int, seed: int, exact: dict[str, Any]
    ) -> None:
        generator = torch.Generator("cpu").manual_seed(seed)
        for name in weights:
            if own[name].dim() != 2:
                continue
            self._bases[name] = own[name].detach().to(exact["device"])
            rows, columns = own[name].shape
            inner = min(rank, rows, columns)
            down = torch.empty((inner, columns), dtype=torch.float32, device="cpu")
            down.normal_(0, 1 / math.sqrt(columns), generator=generator)
            self.values[name + _LOW_RANK[0]] = self._value(name + _LOW_RANK[0], down.to(**exact))
            self.values[name + _LOW_RANK[1]] = self._value(name + _LOW_RANK[1], torch.zeros((rows, inner), **exact))

    @property
    def names(self) -> list[str]:
        """The names of the model's parameters that change."""
        return [*(name for name in self.values if not name.endswith(_LOW_RANK)), *self._bases]

    def effective(self) -> dict[str, Tensor]:
        """The model's parameters that change, in float32, by their names; they can be differentiated."""
        found: dict[str, Tensor] = {name: one for name, one in self.values.items() if not name.endswith(_LOW_RANK)}
        for name, base in self._bases.items():
            update = self.values[name + _LOW_RANK[1]] @ self.values[name + _LOW_RANK[0]]
            if name in self._gone:
                update = update * ~self._gone[name]
            found[name] = base.float() + update
        return found

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The values in training, each in memory of its own, as files of tensors want them."""
        return {name.replace(".", "/"): one.detach().contiguous() for name, one in self.values.items()}

    def train(self, mode: bool = True) -> Student:
        """Training is a matter of the loss: dropout stays off, so that student and teacher see the same."""
        self.training = mode
        return self

    def forward(self, input_ids: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """The loss of windows (n, S): in training to be minimised, else the language model's own alone."""
        student, teacher = self._held
        teacher = teacher if self.training and self._share else None
        share = self._share if teacher is not None else 0.0
        targets = input_ids[:, 1:].flatten()
        wanted = None
        if teacher is not None:
            with torch.no_grad():
                wanted = _before_head(teacher, input_ids)
        values = {self._inner[name]: one.to(self._dtype) for name, one in self.effective().items()}
        hidden = _before_head(student, input_ids, values)
        known = None if teacher is None else teacher.head or _same
        if student.head is None:
            return {"loss": logit_losses(hidden, targets, known, wanted, share)}
        return {"loss": token_losses(hidden, student.head, targets, known, wanted, share)}


def _same(logits: Tensor) -> Tensor:
    return logits


def _names_inside(model: nn.Module, found: Reader, names: list[str]) -> dict[str, str]:
    """What the part of the model that is run calls the parameters of these names."""
    if found.body is None:
        return {name: name for name in names}
    inside = {id(one): name for name, one in found.body.named_parameters()}
    return {name: inside[id(model.get_parameter(name))] for name in names}


def _before_head(found: Reader, tokens: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
    """(n (S - 1), d): the hidden states that the head takes, without each window's last; or the logits themselves."""
    module = found.model if found.body is None else found.body
    options = {"input_ids": tokens, "use_cache": False}
    output = module(**options) if values is None else functional_call(module, dict(values), (), options)
    states: Tensor = output.logits if found.body is None else output[0]
    return states[:, :-1].flatten(0, 1)
