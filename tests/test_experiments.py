"""What must hold for the experiments: they go on where they stopped, and mix no settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.experiments import grid
from benchmarks.experiments.grid import EXPERIMENTS, Run
from benchmarks.experiments.store import Store
from thanos import Options

SETTINGS = {"dtype": "float32", "window": 1024}


def row(run: Run, perplexity: float = 1.0) -> dict:
    return {"run": run.to_dict(), "perplexity": perplexity, "zero_shot": None}


def store(folder: Path, name: str = "main", settings: dict | None = None) -> Store:
    return Store(folder, name, f"python -m benchmarks.experiments {name}", settings or SETTINGS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_possible_and_stands_once(name: str) -> None:
    runs = EXPERIMENTS[name]()
    assert len(set(runs)) == len(runs)
    for run in runs:
        if run.method != "dense":
            chosen = {"method": run.method, "block_size": run.block_size, "metric": run.metric}
            options = Options.of(str(run.pattern), **chosen, outlier_fraction=run.alpha)
            for rows, columns in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
                options.check_layer(rows, columns)


def test_a_rerun_does_only_what_is_missing(tmp_path: Path) -> None:
    runs = [Run(seed=seed) for seed in range(3)]
    first = store(tmp_path)
    assert first.missing(runs, False) == runs
    first.add(row(runs[1]), runs)
    again = store(tmp_path)
    assert again.missing(runs, False) == [runs[0], runs[2]]
    again.add(row(runs[0]), runs)
    rows = json.loads((tmp_path / "main.json").read_text())["rows"]
    assert [entry["run"]["seed"] for entry in rows] == [0, 1]  # in the order of the runs, not of their ends


def test_a_row_without_its_zero_shot_accuracy_is_not_complete(tmp_path: Path) -> None:
    runs = [Run(seed=0), Run(seed=1)]
    kept = store(tmp_path)
    for run in runs:
        kept.add(row(run), runs)
    assert kept.missing(runs, False) == []
    assert kept.missing(runs, True) == [runs[0]]


def test_the_same_run_is_taken_from_another_experiment(tmp_path: Path) -> None:
    runs = [Run(), Run(alpha=0.1)]
    store(tmp_path).add(row(runs[0], 7.0), runs)
    other = store(tmp_path, "alpha")
    other.borrow(runs)
    other.write(runs)
    assert other.missing(runs, False) == [runs[1]]
    assert json.loads((tmp_path / "alpha.json").read_text())["rows"][0]["perplexity"] == 7.0


def test_results_of_other_settings_are_neither_mixed_nor_borrowed(tmp_path: Path) -> None:
    runs = [Run()]
    store(tmp_path).add(row(runs[0]), runs)
    with pytest.raises(ValueError, match="other settings"):
        store(tmp_path, settings={**SETTINGS, "window": 512})
    other = store(tmp_path, "alpha", {**SETTINGS, "window": 512})
    other.borrow(runs)
    assert other.missing(runs, False) == runs


def test_rows_of_another_kind_are_not_taken(tmp_path: Path) -> None:
    runs = [Run(alpha=0.1)]
    store(tmp_path).add(row(runs[0]), runs)
    outliers = store(tmp_path, "outliers")
    outliers.borrow(runs)
    assert outliers.missing(runs, False) == runs


def test_three_of_thirty_blocks_stay_dense_where_sparsities_are_matched() -> None:
    names = [f"model.layers.{block}.mlp.up_proj" for block in range(30)]
    assert sum(re.search(grid.A_TENTH_DENSE, name) is not None for name in names) == 3
