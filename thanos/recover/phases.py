"""Masks that move: weights outside a pattern fade to zero, or dense and sparse phases take turns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.pattern import SemiStructured
from thanos.recover.masks import FixedMask, Sparse, has_pattern, like_weight
from thanos.recover.options import TRAINABLE

FADING = 0.6
"""The share of the training in which weights outside the pattern fade; in the rest the mask stands."""
CHOSEN = 20
"""How often, while weights fade, it is chosen anew which do."""
DENSE = ((0.1, 0.3), (0.45, 0.6))
"""The dense phases of ``acdc``, in shares of the training; before, between and behind them it is sparse."""

_FILE = "masks.safetensors"


@dataclass(frozen=True)
class _Place:
    """A layer among what is trained.

    Attributes:
        weight: (c, b), a view of the trained values.
        gone: (c, b), bool, a view of the mask.
        chosen: (c,), bool: the rows that lose weights.
        count: how many weights of these rows are to be zero, where the pattern does not say how many of a group.
    """

    weight: Tensor
    gone: Tensor
    chosen: Tensor
    count: int


class MovingMask(FixedMask):
    """A mask that is chosen by magnitude while training goes on.

    Args:
        values: what is trained, see :class:`FixedMask`.
        model: whose layers they are.
        sparse: the layers.
        pattern: of the zeros; None takes as many in each layer as there are.
    """

    steady = False

    def __init__(
        self, values: Mapping[str, Tensor], model: nn.Module, sparse: list[Sparse], pattern: TRAINABLE | None
    ) -> None:
        super().__init__(values, {})
        self._pattern = pattern
        self._places = []
        self._masking = self._final = all(has_pattern(one, pattern) for one in sparse)
        for one in sparse:
            name = one.layer.parameter_name
            value, own = values[name].detach(), model.get_parameter(name)
            if name not in self.gone:
                self.gone[name] = torch.zeros_like(value, dtype=torch.bool)
            weight, gone = (like_weight(one.layer, tensor, own) for tensor in (value, self.gone[name]))
            gone.copy_(one.gone)
            share = pattern is None or isinstance(pattern, SemiStructured)
            count = int(one.gone.sum()) if share else pattern.count(weight.numel())  # type: ignore[union-attr]
            self._places.append(_Place(weight, gone, ~one.exempt.to(weight.device), count))
        if not self._final:
            self.choose()

    @property
    def final(self) -> bool:
        return self._final

    def before_step(self) -> None:
        if self._masking:
            super().before_step()

    @abstractmethod
    def after_step(self, progress: float) -> None:
        """What happens to the weights after a step."""

    def choose(self) -> None:
        """The mask anew: the smallest weights of each layer, but for its outlier rows."""
        for one in self._places:
            rows = one.weight[one.chosen].contiguous()
            if isinstance(self._pattern, SemiStructured):
                smallest = kernels.select_n_of_m(rows.abs(), self._pattern.n, self._pattern.m)
            else:
                norms = torch.ones(rows.shape[1], dtype=rows.dtype, device=rows.device)
                smallest, _ = kernels.select_smallest(rows, norms, min(one.count, rows.numel()), rows.shape[1])
            one.gone.zero_()
            one.gone[one.chosen] = smallest

    def settle(self) -> None:
        for one in self._places:
            one.gone.copy_(one.weight == 0)

    def save(self, folder: Path) -> None:
        held = {name.replace(".", "/"): mask.contiguous() for name, mask in self.gone.items()}
        flags = torch.tensor([self._masking, self._final], dtype=torch.bool, device="cpu")
        save_file({**held, "flags": flags}, folder / _FILE)

    def load(self, folder: Path) -> None:
        held = load_file(folder / _FILE)
        self._masking, self._final = (bool(flag) for flag in held["flags"])
        for name, mask in self.gone.items():
            mask.copy_(held[name.replace(".", "/")])


class DecayingMask(MovingMask):
    """Weights outside the pattern are scaled down, step by step, and learn meanwhile; then they are zero and stay so.

    After Kao et al., *Training Recipe for N:M Structured Sparsity with Decaying Pruning Mask* (2022).
    """

    def after_step(self, progress: float) -> None:
        before, now = self._faded, min(1.0, progress / FADING)
        self._faded = now
        if before >= 1:
            super(MovingMask, self).after_step(progress)
            return
        if int(now * CHOSEN) > int(before * CHOSEN):
            self.choose()
        with torch.no_grad():
            for one in self._places:
                one.weight.mul_(torch.where(one.gone, (1 - now) / (1 - before), 1.0).to(one.weight.dtype))
        if now >= 1:
            super(MovingMask, self).after_step(progress)
            self._masking = self._final = True

    _faded = 0.0

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "faded").write_text(repr(self._faded), encoding="utf-8")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._faded = float((folder / "faded").read_text(encoding="utf-8"))


class AlternatingMask(MovingMask):
    """Sparse and dense phases in turn, each mask chosen at the end of a dense one, and a sparse phase at the end.

    After Peste et al., *AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks* (2021).
    """

    def after_step(self, progress: float) -> None:
        dense = any(begin <= progress < end for begin, end in DENSE)
        if not dense:
            if not self._masking and self._was_dense:
                self.choose()
            super(MovingMask, self).after_step(progress)
        self._masking = self._final = not dense
        self._was_dense = dense

    _was_dense = False

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._was_dense = not self._masking
