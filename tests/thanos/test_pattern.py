"""Patterns: what text means, exact counts, refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos import Pattern, SemiStructured, Structured, Unstructured, parse_pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.5", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        (" 12.5% ", Unstructured(0.125)),
        (".25", Unstructured(0.25)),
        ("unstructured:0.6", Unstructured(0.6)),
        ("2:4", SemiStructured(2, 4)),
        ("4:8", SemiStructured(4, 8)),
        ("structured:0.3", Structured(0.3)),
        ("structured:30%", Structured(0.3)),
    ],
)
def test_text(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "half", "1.5", "1", "100%", "150%", "-0.1", "4:2", "4:4", "0:4", "2:", "structured", "nan", "0.5.5"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|must"):
        parse_pattern(text)


@given(percent=st.integers(0, 99), weights=st.integers(0, 10**9))
def test_counts_are_those_of_the_decimal_number(percent: int, weights: int) -> None:
    assert Unstructured(percent / 100).count(weights) == percent * weights // 100
    assert Structured(percent / 100).columns(weights) == -(-percent * weights // 100)


def test_columns_leave_room_for_outlier_rows() -> None:
    assert Structured(0.3).columns(96, 0.1) == 32
    assert Structured(0.9).columns(10, 0.1) == 10
    Structured(0.9).validate(10, 10, 0.1)
    with pytest.raises(ValueError, match="must not exceed 1"):
        Structured(0.91).validate(10, 10, 0.1)
