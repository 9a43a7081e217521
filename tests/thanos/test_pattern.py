"""Patterns: what text means, exact counts, refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thanos import (
    Axis,
    Pattern,
    SemiStructured,
    Shrink,
    Structured,
    Unstructured,
    parse_any_pattern,
    parse_pattern,
)


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


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("channels:0.25", [Axis("channels", share=0.25)]),
        ("heads:12.5%", [Axis("heads", share=0.125)]),
        ("kv-heads:1", [Axis("kv-heads", count=1)]),
        ("experts:.5", [Axis("experts", share=0.5)]),
        ("depth:6@4", [Axis("depth", count=6, sets=4)]),
        (" Channels:25% + depth:2 ", [Axis("channels", share=0.25), Axis("depth", count=2)]),
    ],
)
def test_patterns_of_smaller_models(text: str, axes: list[Axis]) -> None:
    pattern = parse_any_pattern(text)
    assert pattern == Shrink(tuple(axes))
    assert parse_any_pattern(str(pattern)) == pattern
    with pytest.raises(ValueError, match="makes a smaller model"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("channels:0.25+channels:1", "names channels twice"),
        ("heads:1+kv-heads:1", "names both heads and kv-heads"),
        ("channels:1.5", "must be above 0 and less than 1"),
        ("channels:100%", "must be above 0 and less than 1"),
        ("depth:0", "must be above 0"),
        ("depth:6@1", "at least 2 sets"),
        ("heads:2@2", "only depth can follow the input"),
        ("depth:6@4+heads:1", "stands alone"),
        ("channels:0.25+0.5", "'0.5' is none of"),
        ("channels:0.25+", "'' is none of"),
        ("channels:", "is none of"),
        ("channels:-1", "is none of"),
        ("width:0.5", "none of 0.5, 50%"),
    ],
)
def test_bad_patterns_of_smaller_models(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_any_pattern(text)


def test_what_an_axis_asks_for_is_exact() -> None:
    assert Axis("channels", share=0.29).of(100) == 29
    assert Axis("depth", count=6).of(30) == 6
