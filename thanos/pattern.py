"""What to remove: a share of all weights, n of every m, whole columns, or channels, heads, blocks and experts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any


def _exact(value: float) -> Fraction:
    """The decimal number the user wrote: 0.29 * 100 is 29, where floats give 28.999999999999996."""
    return Fraction(repr(float(value)))


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    share: Any = value  # any real number compares; few say so in their types
    if not 0 <= share < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1, not {value}")


@dataclass(frozen=True)
class Unstructured:
    """Remove the share ``sparsity`` of a layer's weights, wherever they are."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_share("sparsity", self.sparsity)

    def __str__(self) -> str:
        return repr(float(self.sparsity))

    def count(self, weights: int) -> int:
        """How many of ``weights`` are removed, rounded down."""
        return math.floor(_exact(self.sparsity) * weights)

    def validate(self, rows: int, columns: int, outlier_fraction: float = 0.0) -> None:
        """Nothing to refuse: any layer can lose any share of its weights."""


@dataclass(frozen=True)
class SemiStructured:
    """Remove n of every m consecutive weights of a row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int:
            raise TypeError(f"n:m must be whole numbers, not {self.n!r}:{self.m!r}")
        if not 0 < self.n < self.m:
            raise ValueError(f"n:m must have 0 < n < m, not {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return self.n / self.m

    def validate(self, rows: int, columns: int, outlier_fraction: float = 0.0) -> None:
        """Raise ValueError unless m divides the layer's width."""
        if columns % self.m:
            raise ValueError(f"pattern {self} needs a width that {self.m} divides, not {columns}")


@dataclass(frozen=True)
class Structured:
    """Remove the share ``sparsity`` of a layer's weights as whole columns of its non-outlier rows."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_share("sparsity", self.sparsity)

    def __str__(self) -> str:
        return f"structured:{float(self.sparsity)!r}"

    def columns(self, columns: int, outlier_fraction: float = 0.0) -> int:
        """``ceil(p b / (1 - alpha))``, how many columns are removed (design of the paper's algorithm 2)."""
        return math.ceil(_exact(self.sparsity) * columns / (1 - _exact(outlier_fraction)))

    def validate(self, rows: int, columns: int, outlier_fraction: float = 0.0) -> None:
        """Raise ValueError where the outlier rows leave too little to remove."""
        if _exact(self.sparsity) > 1 - _exact(outlier_fraction):
            raise ValueError(
                f"pattern {self} with outlier fraction {outlier_fraction:g} would remove more than every column: "
                "sparsity / (1 - outlier fraction) must not exceed 1"
            )


IMPORTANCES = ("obs", "wanda", "magnitude", "fisher", "forward")
"""What decides which channels and heads of a smaller model go."""

AXES = ("channels", "heads", "kv-heads", "depth", "experts")


@dataclass(frozen=True)
class Axis:
    """How much to remove of one axis of a model's shape.

    Attributes:
        name: ``channels`` (of each block's feed-forward), ``heads`` (query heads of each block), ``kv-heads`` (key and
            value heads with the query heads that they serve), ``depth`` (blocks) or ``experts`` (of each mixture).
        share: of what there is, above 0 and below 1; None where ``count`` says how many.
        count: how many to remove, at least 1; None where ``share`` says it.
        sets: with ``depth``: how many sets of blocks, one for each kind of input; None removes one set for good.
    """

    name: str
    share: float | None = None
    count: int | None = None
    sets: int | None = None

    def __post_init__(self) -> None:
        if self.name not in AXES:
            raise ValueError(f"{self.name!r} is none of {', '.join(AXES)}")
        if (self.share is None) == (self.count is None):
            raise ValueError(f"{self.name} takes either a share or a count")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"the share of {self.name} must be above 0 and less than 1, not {self.share:g}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"the number of {self.name} to remove must be at least 1, not {self.count}")
        if self.sets is not None and self.name != "depth":
            raise ValueError(f"only depth can follow the input (@{self.sets}), not {self.name}")
        if self.sets is not None and self.sets < 2:
            raise ValueError(f"depth that follows the input needs at least 2 sets of blocks, not {self.sets}")

    def __str__(self) -> str:
        amount = str(self.count) if self.share is None else repr(float(self.share))
        return f"{self.name}:{amount}" + (f"@{self.sets}" if self.sets else "")

    def of(self, total: int) -> Fraction:
        """How many of ``total`` were asked to go, before rounding."""
        return Fraction(self.count) if self.share is None else _exact(self.share) * total  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shrink:
    """Make the model itself smaller, along one axis or several."""

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pattern {self} names {name} twice; add the shares up")
        if "heads" in names and "kv-heads" in names:
            raise ValueError(f"pattern {self} names both heads and kv-heads; take one of them")
        if len(names) > 1 and any(axis.sets for axis in self.axes):
            raise ValueError(f"pattern {self}: depth that follows the input keeps the whole model, so it stands alone")

    def __str__(self) -> str:
        return "+".join(map(str, self.axes))

    def axis(self, name: str) -> Axis | None:
        """The axis of that name, if it is to be cut."""
        return next((axis for axis in self.axes if axis.name == name), None)


def check_axes(pattern: Shrink, importance: str, trained: bool) -> None:
    """Raise ValueError where an axis does not take an importance, or no axis what is done to cut blocks.

    Args:
        trained: whether blocks are to be reconstructed, or layers to aim at the dense model's output.
    """
    if pattern.axis("experts") is not None and importance not in ("obs", "forward"):
        raise ValueError(
            f"{pattern.axis('experts')} goes by REAP's score (importance obs) or by the mean norm of the experts' "
            f"outputs (forward), not by {importance}"
        )
    widths = any(pattern.axis(name) is not None for name in ("channels", "heads", "kv-heads"))
    if importance != "obs" and not widths and pattern.axis("experts") is None:
        raise ValueError(
            f"{pattern}: blocks go by how far the model's output moves without them; importance {importance} decides "
            "on channels, heads and experts"
        )
    if trained and not widths:
        raise ValueError(
            f"{pattern} leaves every layer's width as it is: reconstruct and correction adjust blocks whose channels "
            "or heads were cut"
        )


Pattern = Unstructured | SemiStructured | Structured

_NUMBER = r"(\d{1,99}\.?\d{0,99}|\.\d{1,99})(e-?\d{1,3})?(%?)"


def parse_pattern(text: str) -> Pattern:
    """Read ``"0.5"``, ``"50%"``, ``"2:4"`` or ``"structured:0.3"``.

    Raises:
        ValueError: the text is none of these, or its numbers are out of range.
        TypeError: it is no text.
    """
    parsed = parse_any_pattern(text)
    if isinstance(parsed, Shrink):
        raise ValueError(
            f"pattern {text!r} makes a smaller model: thanos.shrink_model and python -m thanos.prune take it"
        )
    return parsed


def parse_any_pattern(text: str) -> Pattern | Shrink:
    """Read what :func:`parse_pattern` reads, or ``"channels:0.25"``, ``"heads:25%"``, ``"depth:6"``, and sums by ``+``.

    Raises:
        ValueError: as :func:`parse_pattern`, or an axis is named twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"a pattern to parse must be text such as '0.5' or '2:4', not {type(text).__name__}")
    clean = text.strip().lower()
    if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", clean):
        return SemiStructured(int(match[1]), int(match[2]))
    if match := re.fullmatch(rf"(?:(un)?structured:)?{_NUMBER}", clean):
        number = Fraction(match[2] + (match[3] or "")) / (100 if match[4] else 1)
        if number >= 1:
            raise ValueError(f"sparsity must be at least 0 and less than 1, not {clean}")
        structured = clean.startswith("structured:")
        return Structured(float(number)) if structured else Unstructured(float(number))
    if clean.startswith(tuple(f"{name}:" for name in AXES)) or "+" in clean:
        return Shrink(tuple(_parse_axis(part.strip(), text) for part in clean.split("+")))
    raise ValueError(f"pattern {text!r} is none of 0.5, 50%, 2:4, structured:0.3, channels:0.25, heads:0.25, depth:6")


def _parse_axis(part: str, text: str) -> Axis:
    """One summand: ``name:share``, ``name:count``, with ``@sets`` for depth."""
    match = re.fullmatch(rf"([a-z-]+):(?:{_NUMBER})(?:@(\d+))?", part)
    if not match or match[1] not in AXES:
        raise ValueError(
            f"pattern {text!r}: {part!r} is none of channels:0.25, heads:0.25, kv-heads:1, depth:6, experts:0.5"
        )
    name, digits, exponent, percent, sets = match.groups()
    many = int(sets) if sets else None
    if digits.isdigit() and not exponent and not percent and int(digits) > 0:
        return Axis(name, count=int(digits), sets=many)
    return Axis(name, share=float(Fraction(digits + (exponent or "")) / (100 if percent else 1)), sets=many)


def read_pattern(value: Any) -> Pattern:
    """A pattern as users write it: a :data:`Pattern`, text for :func:`parse_pattern`, or a share as a number.

    Raises:
        ValueError: text that names no pattern, or a share out of range.
        TypeError: anything else.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse_pattern(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        _check_share("sparsity", value)
        return Unstructured(float(value))
    raise TypeError(f"pattern must be text such as '0.5' or '2:4', a share or a Pattern, not {type(value).__name__}")
