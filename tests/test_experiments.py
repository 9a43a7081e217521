"""What must hold for the experiments: they go on where they stopped, and mix no settings."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from benchmarks.experiments import outliers
from benchmarks.experiments.main import A_TENTH_DENSE
from benchmarks.experiments.registry import EXPERIMENTS
from benchmarks.experiments.run import Run
from benchmarks.experiments.store import Store
from benchmarks.records import read
from thanos.options import WalkOptions
from thanos.pattern import Shrink, parse_any_pattern

SETTINGS = {"dtype": "float32", "window": 1024}


def row(run: Run, **fields: object) -> list[dict]:
    return [{"run": run.told(), "machine": {}, "perplexity": 1.0, **fields}]


def store(folder: Path, name: str = "main", settings: dict | None = None) -> Store:
    return Store(folder, name, f"python -m benchmarks.experiments {name}", settings or SETTINGS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_possible_and_stands_once(name: str) -> None:
    runs = EXPERIMENTS[name].runs
    assert len(set(runs)) == len(runs)
    for run in runs:
        if run.pattern is not None and not isinstance(parse_any_pattern(str(run.pattern)), Shrink):
            options = WalkOptions.of(str(run.pattern), **run.options())
            for rows, columns in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
                options.check_layer(rows, columns)


def test_a_run_is_told_by_what_sets_it_apart() -> None:
    run = Run(pattern="2:4", alpha=0.1, seed=2)
    assert run.told() == {"pattern": "2:4", "alpha": 0.1, "seed": 2}
    assert Run(**run.told()) == run
    assert run.options() == {"outlier_fraction": 0.1}


def test_a_rerun_does_only_what_is_missing(tmp_path: Path) -> None:
    runs = EXPERIMENTS["metric"].runs
    first = store(tmp_path, "metric")
    assert first.missing(False) == runs
    first.add(row(runs[3]))
    again = store(tmp_path, "metric")
    assert again.missing(False) == [*runs[:3], *runs[4:]]
    again.add(row(runs[1]))
    kept = [Run(**entry["run"]) for entry in read(tmp_path / "metric.jsonl").rows]
    assert kept == [runs[1], runs[3]], "in the order of the runs, not of their ends"


def test_a_row_without_its_zero_shot_accuracy_is_not_complete(tmp_path: Path) -> None:
    runs = EXPERIMENTS["main"].runs
    kept = store(tmp_path)
    for run in runs:
        kept.add(row(run))
    assert kept.missing(False) == []
    assert kept.missing(True) == [run for run in runs if run.seed == 0]
    kept.add(row(runs[0], zero_shot={}))
    assert runs[0] not in kept.missing(True)


def test_the_same_run_is_taken_from_another_experiment(tmp_path: Path) -> None:
    shared, own = Run(pattern="structured:0.3", alpha=0.1), Run(pattern="structured:0.3", alpha=0.05)
    store(tmp_path).add(row(shared, perplexity=7.0))
    store(tmp_path, "alpha").add(row(own, perplexity=8.0))
    kept = read(tmp_path / "alpha.jsonl").rows
    assert {entry["run"]["alpha"]: entry["perplexity"] for entry in kept} == {0.1: 7.0, 0.05: 8.0}
    store(tmp_path).add(row(shared, perplexity=9.0))
    assert not {shared, own} & set(store(tmp_path, "alpha").missing(False))
    store(tmp_path, "alpha").add([])
    assert 7.0 in [entry["perplexity"] for entry in read(tmp_path / "alpha.jsonl").rows], "its own records count"


def test_results_of_other_settings_are_neither_mixed_nor_borrowed(tmp_path: Path) -> None:
    run = Run(pattern="2:4")
    store(tmp_path).add(row(run))
    with pytest.raises(ValueError, match="other settings"):
        store(tmp_path, settings={**SETTINGS, "window": 512})
    assert run in store(tmp_path, "alpha", {**SETTINGS, "window": 512}).missing(False)


def test_rows_of_another_kind_are_not_taken(tmp_path: Path) -> None:
    [run] = EXPERIMENTS["outliers"].runs
    store(tmp_path).add(row(run))
    assert store(tmp_path, "outliers").missing(False) == [run]


def test_outlier_rows_are_those_of_the_largest_outputs() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.layers[0].mlp.gate_proj.weight.data[:5] *= 100
    lab: Any = SimpleNamespace(model=model, samples=lambda run: torch.randint(64, (4, 16)))
    rows = outliers.measure(lab, Run(pattern="0.5", alpha=0.1), zero_shot=False)
    assert len(rows) == 2 * len(outliers.KINDS)
    assert all(row["energy_share"] > row["outliers"] / row["rows"] for row in rows)
    loud = next(row for row in rows if row["name"].endswith("0.mlp.gate_proj"))
    assert (loud["rows"], loud["outliers"]) == (48, 5)
    assert loud["energy_share"] > 0.99


def test_three_of_thirty_blocks_stay_dense_where_sparsities_are_matched() -> None:
    names = [f"model.layers.{block}.mlp.up_proj" for block in range(30)]
    assert sum(re.search(A_TENTH_DENSE, name) is not None for name in names) == 3
