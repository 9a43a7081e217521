"""What to remove: a share of all weights, n of every m, or whole columns."""

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


Pattern = Unstructured | SemiStructured | Structured

_NUMBER = r"(\d{1,99}\.?\d{0,99}|\.\d{1,99})(e-?\d{1,3})?(%?)"


def parse_pattern(text: str) -> Pattern:
    """Read ``"0.5"``, ``"50%"``, ``"2:4"`` or ``"structured:0.3"``.

    Raises:
        ValueError: the text is none of these, or its numbers are out of range.
        TypeError: it is no text.
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
    raise ValueError(f"pattern {text!r} is none of 0.5, 50%, 2:4, structured:0.3")


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
