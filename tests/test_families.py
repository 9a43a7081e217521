"""The README's table of families holds those that the suite prunes, packs and reloads, and no others."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import FAMILIES
from tests.mixtures import FUSED, MIXTURES
from tests.thanos.walk.test_weights import UNUSUAL

APART = {name: entry for name, entry in MIXTURES.items() if name not in FUSED}
TOGETHER = {name: entry for name, entry in MIXTURES.items() if name in FUSED}
ALL, PARTLY = "every linear layer of the blocks", "all but what is shared or computed"
# What tests/thanos/walk prunes and tests/thanos/compact/test_families.py packs and reloads.
ROWS = [
    ("dense and state-space", FAMILIES, ALL, "the same layers", "layers compressed"),
    ("mixtures of experts", APART, "and every expert", "and every expert", "an expert is read for its tokens alone"),
    ("mixtures whose files hold experts together", TOGETHER, "and every expert", "all but experts", "experts dense"),
    ("with parts that stay dense", UNUSUAL, PARTLY, "the same layers", "layers compressed"),
]


def table() -> str:
    """The table as it stands in the README."""
    lines = ["| kind | families | pruned | packed | reloaded |", "| --- | --- | --- | --- | --- |"]
    for kind, families, *columns in ROWS:
        names = ", ".join(sorted(name for name, *_ in families.values()))  # type: ignore[misc]
        lines.append(f"| {' | '.join([kind, names, *columns])} |")
    return "\n".join(lines)


def test_the_table_of_families_is_that_of_the_tests() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    found = text.partition("<!-- families -->")[2].partition("<!-- /families -->")[0].strip()
    assert found == table(), f"the README should say:\n{table()}"
