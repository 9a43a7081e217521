"""What is minimised: a mixture of the distance to a teacher's predictions and of the language model's own loss.

With q the student's and p the teacher's distribution of the next token, y the token that follows, and κ the share of
the teacher,

    loss = mean over tokens of  κ Σ_v p_v (log p_v − log q_v)  −  (1 − κ) log q_y

whose gradient by the student's logits is ``q − κ p − (1 − κ) 1_y``. It is known as soon as the logits are, so a few
rows of logits live at a time: they are computed from the hidden states, turned into loss and gradient, carried back
through the output head, and forgotten. No tensor of (tokens, vocabulary) ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_NUMBERS = 1 << 24  # of logits at a time, of the student and of the teacher
_CACHED = 1 << 19  # of them in float32 at a time on a CPU, so that a dozen passes over them stay in its cache

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """An output head that is a plain product; it stays as it is.

    Attributes:
        weight: (V, d).
        bias: (V,), if there is one.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits (T, V) of hidden states (T, d)."""
        return linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def token_losses(
    hidden: Tensor, head: Head, targets: Tensor, teacher: Logits | None, wanted: Tensor | None, share: float
) -> Tensor:
    """The mean loss, a 0-d float32 tensor that can be differentiated by ``hidden``.

    Args:
        hidden: (T, d): the student's hidden states in front of its head.
        targets: (T,), int64: the tokens that follow.
        teacher: makes logits of rows of ``wanted``; None where there is no teacher.
        wanted: (T, ...): the teacher's hidden states, or its logits.
        share: κ, from 0 to 1; 0 without a teacher.
    """
    loss: Tensor = _ThroughHead.apply(hidden, head, targets, teacher, wanted, share)  # type: ignore[no-untyped-call]
    return loss


def logit_losses(
    logits: Tensor, targets: Tensor, teacher: Logits | None, wanted: Tensor | None, share: float
) -> Tensor:
    """As :func:`token_losses`, from logits (T, V): for models that do more than a product after their last block."""
    loss: Tensor = _OfLogits.apply(logits, targets, teacher, wanted, share)  # type: ignore[no-untyped-call]
    return loss


def rows_of_logits(vocabulary: int) -> int:
    """How many rows are worked on at a time."""
    return max(16, _NUMBERS // vocabulary)


def _rows(logits: Tensor, targets: Tensor, wanted: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """The summed loss of some rows, 0-d, float32, and its gradient by their logits, in the logits' dtype."""
    step = len(logits) if logits.device.type != "cpu" else max(1, _CACHED // logits.shape[1])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits)
    for begin in range(0, len(logits), step):
        part = slice(begin, begin + step)
        known = None if wanted is None else wanted[part]
        loss, gradient[part] = _few_rows(logits[part], targets[part], known, share)
        total += loss
    return total, gradient


def _few_rows(logits: Tensor, targets: Tensor, wanted: Tensor | None, share: float) -> tuple[Tensor, Tensor]:
    """The summed loss of rows and its gradient, both in float32."""
    logs = logits.to(torch.float32, copy=True)
    logs.sub_(logs.logsumexp(1, keepdim=True))  # log q
    own = logs.gather(1, targets[:, None])[:, 0]
    if wanted is None or not share:
        gradient = logs.exp_()
        gradient[torch.arange(len(targets), dtype=torch.int64, device=targets.device), targets] -= 1
        return -own.sum(), gradient
    known = wanted.to(torch.float32, copy=True)
    known.sub_(known.logsumexp(1, keepdim=True))  # log p
    chances = known.exp()
    distance = chances.flatten().dot(known.sub_(logs).flatten())
    loss = share * distance - (1 - share) * own.sum()
    gradient = logs.exp_().sub_(chances, alpha=share)
    gradient[torch.arange(len(targets), dtype=torch.int64, device=targets.device), targets] -= 1 - share
    return loss, gradient


class _ThroughHead(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        teacher: Logits | None,
        wanted: Tensor | None,
        share: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        back = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        step = rows_of_logits(len(head.weight))
        for begin in range(0, len(hidden), step):
            part = slice(begin, begin + step)
            known = None if teacher is None or wanted is None else teacher(wanted[part])
            loss, gradient = _rows(head(hidden[part]), targets[part], known, share)
            total += loss
            if back is not None:
                back[part] = (gradient @ head.weight).to(back.dtype)
        if back is not None:
            context.save_for_backward(back)
        return total / len(hidden)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = context.saved_tensors
        return back * (gradients[0] / len(back)), None, None, None, None, None


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, logits: Tensor, targets: Tensor, teacher: Logits | None, wanted: Tensor | None, share: float
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        back = torch.empty_like(logits) if context.needs_input_grad[0] else None
        step = rows_of_logits(logits.shape[1])
        for begin in range(0, len(logits), step):
            part = slice(begin, begin + step)
            known = None if teacher is None or wanted is None else teacher(wanted[part])
            loss, gradient = _rows(logits[part], targets[part], known, share)
            total += loss
            if back is not None:
                back[part] = gradient
        if back is not None:
            context.save_for_backward(back)
        return total / len(logits)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = context.saved_tensors
        return back * (gradients[0] / len(back)), None, None, None, None


@dataclass(frozen=True)
class Reader:
    """How a model's predictions are had.

    Attributes:
        model: the whole of it.
        body: what gives the hidden states in front of the head; None where logits are more than a product of them.
        head: the product; None likewise.
    """

    model: nn.Module
    body: nn.Module | None
    head: Head | None


def reader(model: Any) -> Reader:
    """Find out, on two tokens, whether a model's logits are its head's product of the hidden states of its body."""
    body = getattr(model, "base_model", None)
    module: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(module, "weight", None)
    if not isinstance(body, nn.Module) or body is model or not isinstance(weight, Tensor) or weight.dim() != 2:
        return Reader(model, None, None)
    head = Head(weight.detach(), None if getattr(module, "bias", None) is None else module.bias.detach())
    tokens = torch.tensor([[0, 1]], dtype=torch.int64, device=weight.device)
    try:
        with torch.no_grad():
            hidden = body(input_ids=tokens, use_cache=False)[0]
            found, expected = head(hidden), model(input_ids=tokens, use_cache=False).logits
    except Exception:  # of a model's own code
        return Reader(model, None, None)
    alike = found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    return Reader(model, body, head) if alike else Reader(model, None, None)
