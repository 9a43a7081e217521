"""The arithmetic and the records of the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine, records
from benchmarks.ge import fitted_exponent, middle_round

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("power", [1.0, 2.5, 3.0])
def test_the_exponent_of_a_power_is_its_power(power: float) -> None:
    widths = [1024, 2048, 4096, 8192]
    assert fitted_exponent(widths, [3e-9 * width**power for width in widths]) == pytest.approx(power)


def test_a_constant_factor_leaves_the_exponent_and_noise_is_averaged() -> None:
    widths, seconds = [1024, 2048, 4096, 8192], [1.1, 7.6, 66.0, 500.0]
    slope = fitted_exponent(widths, seconds)
    assert fitted_exponent(widths, [7 * one for one in seconds]) == pytest.approx(slope)
    assert 2.9 < slope < 3.0


def test_the_machine_is_described_but_not_named() -> None:
    text = json.dumps(machine.describe())
    for secret in (platform.node(), os.getcwd(), sys.executable):
        assert secret not in text


def test_each_suite_is_run_by_make_and_asks_for_what_there_is() -> None:
    """A benchmark whose fixture was renamed fails only when it runs; the plan of a run finds it."""
    suites = {path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")}
    named = re.search(r"^SUITES \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named is not None
    assert set(named[1].split()) == suites
    command = [sys.executable, "-m", "pytest", "benchmarks", "--setup-plan", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_machine_is_told_once() -> None:
    one = {"processor": "p", "cores": 2, "threads": 1, "memory_gib": 8, "python": "3.11"}
    rows = [{"machine": one}, {"machine": one}, {"machine": {**one, "cores": 4}}, {"machine": {}}]
    told = ["Machine: p, 2 cores, 1 thread, 8 GiB of memory, Python 3.11.", "Machine: p, 4 cores,"]
    assert [sentence.startswith(text) for sentence, text in zip(machine.sentences(rows), told, strict=True)]


def test_a_file_has_a_record_a_line_and_its_machine_once(tmp_path: Path) -> None:
    rows = [{"name": "a ± b", "machine": {"cores": 2}}, {"name": "b", "steps": {}, "machine": {"cores": 2}}]
    records.write(tmp_path / "x.jsonl", {"command": "c"}, rows)
    text = (tmp_path / "x.jsonl").read_text()
    assert len(text.splitlines()) == 3
    assert text.count("machine") == 1
    assert records.read(tmp_path / "x.jsonl") == ({"command": "c"}, rows)
    rows[0]["machine"] = {"cores": 4}
    records.write(tmp_path / "x.jsonl", {}, rows)
    assert records.read(tmp_path / "x.jsonl").rows == rows


def test_a_partial_run_replaces_its_own_records_and_no_other(tmp_path: Path) -> None:
    path, here = tmp_path / "layer.jsonl", {"cores": 2}
    records.keep(path, [{"name": name, "ge": 1.0, "machine": here} for name in "abc"])
    assert records.keep(path, [{"name": name, "ge": 2.0, "machine": here} for name in "db"]) == path
    assert [(row["name"], row["ge"]) for row in records.read(path).rows] == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]


def test_a_partial_run_on_another_machine_goes_beside_the_file(tmp_path: Path) -> None:
    path, there = tmp_path / "layer.jsonl", {"cores": 4}
    records.keep(path, [{"name": name, "machine": {"cores": 2}} for name in "ab"])
    before = path.read_text()
    beside = records.keep(path, [{"name": "a", "machine": there}])
    assert (path.read_text(), beside.name) == (before, "layer.new.jsonl")
    assert records.keep(path, [{"name": name, "machine": there} for name in "abc"]) == path
    assert len(records.read(path).rows) == 3


def test_floats_keep_six_digits() -> None:
    value = {"seconds": 0.123456789, "rows": 4096, "steps": {"factor": 1e-7 / 3}, "limit_ge": None}
    kept = {"seconds": 0.123457, "rows": 4096, "steps": {"factor": 3.33333e-08}, "limit_ge": None}
    assert records.rounded(value) == kept


def test_a_round_is_compared_with_the_products_around_it() -> None:
    seconds, units = [2.0, 9.0, 3.0], [1.0, 1.0, 5.0, 1.0]
    assert middle_round(seconds, units) == (0, 1.0)  # GE 2, 3 and 1
    assert middle_round([4.0, 1.0], [1.0, 1.0, 1.0]) == (1, 1.0)
    assert middle_round([3.0], [1.0, 2.0]) == (0, 1.5)
    with pytest.raises(ValueError, match="one product more"):
        middle_round([3.0], [1.0, 1.0, 2.0])
