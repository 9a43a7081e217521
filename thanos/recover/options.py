"""How a pruned model is trained: each option, its default and its check."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from thanos.pattern import SemiStructured, Shrink, Structured, Unstructured, parse_any_pattern

TRAINED = ("weights", "norms", "lora")
"""What is trained: all kept weights with norms and biases, norms and biases alone, or low-rank updates with them."""

MASKS = ("fixed", "decaying", "acdc")
"""How the zeros come about: they are there; weights outside the pattern fade; or dense and sparse phases alternate."""

RATES = {"weights": 4e-4, "norms": 3e-3, "lora": 1e-3}
"""Adam's learning rate by what is trained, where none is given."""

COMPUTE = ("auto", "bfloat16", "float32")

TRAINABLE = Unstructured | SemiStructured


@dataclass(frozen=True)
class RecoverOptions:
    """How a pruned model is trained.

    Attributes:
        minutes, steps: how long; exactly one of them.
        train: what is trained, one of :data:`TRAINED`.
        mask: how the zeros come about, one of :data:`MASKS`.
        pattern: what the zeros must be; None takes them as they are in the model.
        learning_rate: of Adam, its highest; None is that of :data:`RATES`.
        share: of the distance to the teacher in the loss, from 0 to 1; the rest is the language model's own loss.
        repeats: of the windows trained on, the share whose second half repeats the first; they are added to the text's
            own, see :func:`thanos.recover.windows.with_repeats`.
        rank: of the low-rank updates.
        batch_size: windows in a step, of each process.
        evaluations: how often the loss on the windows held out is measured, beside the start.
        save_minutes: between two checkpoints that a run can be taken up from.
        compute: dtype of forwards and backwards; ``auto`` is bfloat16 where the device multiplies it in hardware.
        seed: of the order of the windows and of the low-rank updates.

    Raises:
        ValueError, TypeError: a value that could suit no model.
    """

    minutes: float | None = None
    steps: int | None = None
    train: str = "weights"
    mask: str = "fixed"
    pattern: TRAINABLE | None = None
    learning_rate: float | None = None
    share: float = 0.4
    repeats: float = 0.25
    rank: int = 16
    batch_size: int = 4
    evaluations: int = 6
    save_minutes: float = 5.0
    compute: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("train", TRAINED), ("mask", MASKS), ("compute", COMPUTE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("it must be said how long to train, in minutes or in steps, and not in both")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be above 0, not {self.minutes:g}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning rate must be above 0, not {self.learning_rate:g}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {self.share:g}")
        if not 0 <= self.repeats <= 0.5:
            raise ValueError(f"repeats must be from 0 to 0.5, not {self.repeats:g}")
        for name in ("steps", "rank", "batch_size", "evaluations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
        if self.mask != "fixed" and self.train != "weights":
            raise ValueError(f"mask {self.mask} moves the zeros, so it trains weights, not {self.train}")
        if self.mask == "decaying" and self.pattern is None:
            raise ValueError("mask decaying needs a pattern to fade to, such as 2:4 or 0.5")

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

    def record(self) -> dict[str, Any]:
        """Plain values for a report."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "pattern": None if self.pattern is None else str(self.pattern), "learning_rate": self.rate}


def trainable_pattern(text: str) -> TRAINABLE:
    """A pattern that zeros can be trained to: a share of the weights, or n of every m.

    Raises:
        ValueError: the text is no pattern, or one of whole columns or of a smaller model.
    """
    pattern = parse_any_pattern(text)
    if isinstance(pattern, Structured | Shrink):
        raise ValueError(
            f"pattern {text!r} is a matter of shapes; only unstructured and n:m patterns are trained to, and a smaller "
            "model is trained as it is, without a pattern"
        )
    return pattern
