"""How a model is made smaller: each option and its check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from thanos.pattern import IMPORTANCES, Shrink, check_axes


@dataclass(frozen=True)
class ShrinkOptions:
    """The options of :func:`thanos.shrink_model`, which describes them.

    Raises:
        ValueError, TypeError: a value that could suit no model.
    """

    importance: str = "obs"
    multiple: int = 64
    damping: float = 0.01
    correction: float = 0.0
    reconstruct: int = 0
    batch_size: int | None = None
    backend: str = "auto"
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance {self.importance!r} is none of {', '.join(IMPORTANCES)}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, not {self.multiple}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be at least 0, not {self.damping}")
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction must be from 0 to 1, not {self.correction}")
        if isinstance(self.reconstruct, bool) or not isinstance(self.reconstruct, int):
            raise TypeError(f"reconstruct must be a whole number of epochs, not {self.reconstruct!r}")
        if self.reconstruct < 0:
            raise ValueError(f"reconstruct must be at least 0, not {self.reconstruct}")

    def check(self, pattern: Shrink) -> None:
        """Raise ValueError where an option says nothing of any axis of ``pattern``."""
        check_axes(pattern, self.importance, self.reconstruct > 0 or self.correction > 0)

    def record(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {**vars(self), "device": None if self.device is None else str(self.device)}
