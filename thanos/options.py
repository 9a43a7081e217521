"""How a layer and a model are pruned: each option, its default and its check, for functions, commands and reports."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, TypeVar

import torch

import thanos_kernels as kernels
from thanos.pattern import Pattern, SemiStructured, Structured, Unstructured, read_pattern
from thanos_kernels.errors import first_line

METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")
_SAME_SHARE = ("wanda", "sparsegpt")  # of each row or block, whatever the layer could do without
REFINEMENTS = ("none", "refit", "admm")
"""What follows the method: nothing; a refit of the kept weights; or a search for a better mask, and the refit."""
VALUES = {"plain": 0, "int8": 127, "int4": 7, "int3": 3}
"""What kept weights are: as they are solved for, or whole numbers up to this one times a scale for 128 columns."""

METRICS = ("wanda", "obs", "magnitude")
"""What Thanos may choose its mask by: |w| * norm of the input, the optimal brain surgeon's w^2 / [H^-1]_jj, or |w|."""

TARGETS = ("own", "corrected")
"""What a layer is pruned towards: its own weight, or one corrected for what pruning did to its input."""

ALLOCATIONS = ("uniform", "lamp", "owl", "curvature", "search")
"""How a model's sparsity is shared out among its layers."""

AUTO = "auto"
"""Where pattern, method and memory allow a search for an allocation, that; else the uniform one."""

EXPERTS = ("routed", "all")
"""The calibration tokens that each expert of a mixture is pruned on."""

QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"refine": "refit", "targets": "corrected"},
    "best": {"refine": "admm", "targets": "corrected", "reconstruct": 4, "allocation": AUTO},
}
"""Presets: the options that each sets where they are not given."""

Own = TypeVar("Own", bound="Options")


@dataclass(frozen=True)
class Options:
    """How one layer is pruned.

    Attributes:
        pattern: what is removed.
        method: ``thanos``, ``sparsegpt``, ``wanda`` or ``magnitude``.
        block_size: columns per block, B; None is 128, or about 512 for n:m without a refinement. A multiple of m.
        outlier_fraction: alpha: the ``ceil(alpha c)`` rows with the largest ``(W H W.T)_ii`` are left untouched.
        damping: added to the Hessian's diagonal, relative to its mean.
        metric: what Thanos chooses its mask by: ``wanda``, ``abs(w) * norm`` of the input (the paper's, and what None
            means); ``obs``, ``w^2 / [H^-1]_jj`` of the columns that remain; or ``magnitude``.
        refine: what follows the method: ``none``; ``refit``, the kept weights solved for once more with the mask as it
            is; or ``admm``, a search for a better mask of the same pattern between two refits. The layer loss never
            rises.
        values: what kept weights are: ``plain``, or rounded to ``int8`` as :func:`thanos.pack` rounds them, where later
            columns make up for what rounding did to earlier ones; ``int4`` and ``int3`` are there to compare with, and
            have no packed form. Of whole removed columns they stay plain.
        backend: of the operations: ``auto``, ``native``, ``triton`` or ``reference``.

    Raises:
        ValueError, TypeError: a value that could suit no layer.
    """

    pattern: Pattern
    method: str = "thanos"
    block_size: int | None = None
    outlier_fraction: float = 0.0
    damping: float = 0.01
    metric: str | None = None
    refine: str = "none"
    values: str = "plain"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("backend", self.backend, kernels.BACKENDS)
        _choice("refine", self.refine, REFINEMENTS)
        _choice("values", self.values, tuple(VALUES))
        if self.metric is not None:
            _choice("metric", self.metric, METRICS)
            if self.method != "thanos":
                raise ValueError(f"metric is an option of the method thanos; {self.method} has its own")
        _whole("block size", self.block_size)
        m = self.pattern.m if isinstance(self.pattern, SemiStructured) else 1
        if self.block_size is not None and self.block_size % m:
            raise ValueError(f"block size must be a multiple of {m} for pattern {self.pattern}, not {self.block_size}")
        if not 0 <= real_number("outlier fraction", self.outlier_fraction) < 1:
            raise ValueError(f"outlier fraction must be at least 0 and less than 1, not {self.outlier_fraction}")
        next(kernels.damping_schedule(real_number("damping", self.damping)))
        if not isinstance(self.pattern, SemiStructured):
            self.check_layer(sys.maxsize, 1)

    @classmethod
    def of(cls: type[Own], pattern: Any, **options: Any) -> Own:
        """Options from a pattern as users write it (``0.5``, ``"50%"``, ``"2:4"``, a :data:`Pattern`) and keywords.

        Raises:
            TypeError: an unknown keyword, or a value of a wrong type.
            ValueError: a value that could suit no layer.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "pattern"]
        if "quality" in known:
            options = {**preset(options.get("quality", "fast")), **options}
        if unknown := sorted(options.keys() - set(known)):
            raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(known)}")
        return cls(read_pattern(pattern), **options)

    @property
    def width(self) -> int:
        """Columns per block, B."""
        if self.block_size is not None:
            return self.block_size
        m = self.pattern.m if isinstance(self.pattern, SemiStructured) else 1
        columns = 128 if m == 1 or self.refine != "none" else 512
        return max(m, columns // m * m)

    @property
    def rounds(self) -> bool:
        """Whether kept weights are rounded."""
        return VALUES[self.values] > 0 and not isinstance(self.pattern, Structured)

    def outliers(self, rows: int) -> int:
        """How many of a layer's rows are left untouched."""
        return math.ceil(Fraction(repr(float(self.outlier_fraction))) * rows)

    def check_layer(self, rows: int, columns: int) -> None:
        """Raise ValueError where a layer of ``rows`` x ``columns`` cannot be pruned so."""
        if self.outliers(rows) == rows:
            raise ValueError(
                f"outlier fraction {self.outlier_fraction:g} makes each of the layer's {rows} rows an outlier"
            )
        self.pattern.validate(rows, columns, self.outlier_fraction)


@dataclass(frozen=True)
class WalkOptions(Options):
    """How a model is pruned.

    Attributes:
        exclude: a regular expression; layers in whose full name it is found stay dense.
        passes: 1 runs all samples through a block together and prunes each layer right before it runs; 2 runs every
            block twice, in batches. None takes one pass where the activations of a block fit ``memory_limit``.
        batch_size: samples in a batch of the two-pass walk; None makes batches of about 4096 tokens.
        memory_limit: bytes for activations; None is half of what is free on the device.
        experts: ``routed`` prunes each expert on the tokens routed to it, blended with those of all experts where they
            are few; ``all`` on all tokens.
        device: where blocks are worked on, one at a time; None leaves each where it is.
        targets: ``own`` prunes each layer's weight W; ``corrected`` prunes ``W + correction W D inverse(Hd)``, D what
            the drift of its input from the dense model's correlates with the input (docs/method.md, section 10). It
            runs the dense model beside the pruned one: one more forward, and its hidden states in memory.
        correction: the share of the drift that is corrected, from 0 to 1.
        reconstruct: epochs over the samples in which the kept weights of each block, its norm gains and its biases are
            trained to give the dense model's output of the block; 0 leaves the block as it was pruned.
        allocation: where to remove how much at the same total, decided on the dense model: ``uniform``, the same share
            of each layer; ``lamp``, by the magnitudes of the weights; ``owl``, less from blocks with many outliers;
            ``curvature``, where the sum of the layers' relative losses is least; or ``search``, by moves that bring the
            model's output nearer to the dense one's. For unstructured patterns. ``auto`` is ``search`` where pattern,
            method and memory allow it, else ``uniform``.
        search_evaluations: how many allocations a search may judge, the uniform one included.
        quality: the preset that :meth:`of` took what was not given from: ``fast``, ``balanced`` (a refit and corrected
            targets) or ``best`` (a mask search, corrected targets, reconstruction, and the allocation ``auto``).
    """

    exclude: str | None = None
    passes: int | None = None
    batch_size: int | None = None
    memory_limit: int | None = None
    experts: str = "routed"
    device: str | torch.device | None = None
    targets: str = "own"
    correction: float = 0.5
    reconstruct: int = 0
    allocation: str = "uniform"
    search_evaluations: int = 24
    quality: str = "fast"

    def __post_init__(self) -> None:
        super().__post_init__()
        _whole("passes", self.passes)
        if self.passes not in (None, 1, 2):
            raise ValueError(f"passes must be 1 or 2, not {self.passes}")
        _whole("batch size", self.batch_size)
        _whole("memory limit", self.memory_limit)
        _choice("experts", self.experts, EXPERTS)
        _choice("quality", self.quality, tuple(QUALITIES))
        _choice("allocation", self.allocation, (*ALLOCATIONS, AUTO))
        differ = self.allocation not in ("uniform", AUTO)
        if differ and not isinstance(self.pattern, Unstructured):
            raise ValueError(
                f"allocation {self.allocation} needs a pattern that may differ from layer to layer, a share such as "
                f"0.7, and not {self.pattern}"
            )
        if differ and self.method in _SAME_SHARE:
            raise ValueError(
                f"allocation {self.allocation} needs a method that removes an exact count of a layer, thanos or "
                f"magnitude; {self.method} removes the same share of each row or block"
            )
        if self.search_evaluations is None:
            raise TypeError("search evaluations must be a whole number, not None")
        _whole("search evaluations", self.search_evaluations)
        _choice("targets", self.targets, TARGETS)
        if not 0 <= real_number("correction", self.correction) <= 1:
            raise ValueError(f"correction must be from 0 to 1, not {self.correction}")
        if self.reconstruct is None or isinstance(self.reconstruct, bool):
            raise TypeError(f"reconstruct must be a whole number of epochs, not {self.reconstruct}")
        if self.reconstruct != 0:
            _whole("reconstruct", self.reconstruct, "at least 0")
        if self.exclude is not None and not isinstance(self.exclude, str):
            raise TypeError(f"exclude must be a regular expression, not {type(self.exclude).__name__}")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ValueError(f"exclude is no regular expression: {error} in {self.exclude!r}") from None
        try:
            torch.device(self.device or "cpu")
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.device!r} is no device: {first_line(error)}") from None

    @property
    def beside(self) -> bool:
        """Whether the dense model runs beside the pruned one."""
        return self.reconstruct > 0 or (self.targets == "corrected" and self.correction > 0)

    @property
    def shares_differ(self) -> bool:
        """Whether layers can lose different shares of their weights."""
        return isinstance(self.pattern, Unstructured) and self.method not in _SAME_SHARE

    def arguments(self) -> dict[str, Any]:
        """All options by name, as :func:`thanos.prune_model` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def record(self) -> dict[str, Any]:
        """All options but pattern and method as plain values, for a report."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        device = None if self.device is None else str(self.device)
        return {
            **{name: value for name, value in values.items() if name not in ("pattern", "method")},
            "device": device,
        }


def preset(quality: object) -> dict[str, Any]:
    """The options that a preset sets; ValueError for another name."""
    _choice("quality", quality, tuple(QUALITIES))
    return QUALITIES[str(quality)]


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices or not isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def real_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number of ordinary size") from None


def _whole(name: str, value: Any, least: str = "at least 1") -> None:
    """Refuse what is neither None nor a whole number from 1 on; ``least`` names the bound, where 0 is taken too."""
    if value is None:
        return
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be {least}, not {value}")
