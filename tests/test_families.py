"""The README's table of families holds those that the suite prunes, and no others."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import FAMILIES
from tests.mixtures import MIXTURES
from tests.thanos.walk.test_weights import UNUSUAL


def test_the_table_of_families_is_that_of_the_tests() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    table = text.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    rows = [line.split("|")[2].strip() for line in table.strip().splitlines()[2:]]
    kinds = (FAMILIES, MIXTURES, UNUSUAL)
    assert rows == [", ".join(sorted(name for name, *_ in families.values())) for families in kinds]
