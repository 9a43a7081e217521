"""The arithmetic and the records of the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import sys

import pytest

from benchmarks.ge import fitted_exponent, middle_round
from benchmarks.recording import machine_info, slim


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
    text = json.dumps(machine_info())
    assert platform.node() not in text
    assert os.getcwd() not in text
    assert sys.executable not in text
    assert machine_info()["cores"] == os.cpu_count()


def test_a_report_keeps_its_numbers_and_nothing_else() -> None:
    one = {
        "name": "a",
        "fullname": "benchmarks/a",
        "group": None,
        "param": "UNSERIALIZABLE[...]",
        "options": {"timer": "perf_counter"},
        "extra_info": {"seconds": 0.123456789, "rows": 4096, "steps": {"factor": 1e-7 / 3}, "limit_ge": None},
        "stats": {"min": 1 / 3, "rounds": 2, "data": [1.0, 2.0]},
    }
    report = {"commit_info": {"branch": "b"}, "machine_info": {"processor": "p"}, "benchmarks": [one]}
    slim(report)
    assert report == {
        "machine_info": {"processor": "p"},
        "benchmarks": [
            {
                "group": None,
                "name": "a",
                "fullname": "benchmarks/a",
                "extra_info": {"seconds": 0.123457, "rows": 4096, "steps": {"factor": 3.33333e-08}, "limit_ge": None},
                "stats": {"min": 0.333333, "rounds": 2},
            }
        ],
    }


def test_a_round_is_compared_with_the_products_around_it() -> None:
    seconds, units = [2.0, 9.0, 3.0], [1.0, 1.0, 5.0, 1.0]
    assert middle_round(seconds, units) == (0, 1.0)  # GE 2, 3 and 1
    assert middle_round([4.0, 1.0], [1.0, 1.0, 1.0]) == (1, 1.0)
    assert middle_round([3.0], [1.0, 2.0]) == (0, 1.5)
    with pytest.raises(ValueError, match="one product more"):
        middle_round([3.0], [1.0, 1.0, 2.0])
