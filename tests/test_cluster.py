from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cluster
from benchmarks.cluster import H100, MODELS, Inputs

ROOT = Path(__file__).parents[1]


def test_the_page_holds_what_the_model_gives() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert cluster.filled(text) == text, "run python -m benchmarks.cluster --write docs/scaling.md"
    assert all(f"<!-- {name} -->" in text for name in cluster.SECTIONS)
    a, d = cluster.rates()
    assert f"{a:.2f} + {d:.2f} b / c" in text


def test_models_have_the_weights_that_their_names_say() -> None:
    assert [round(model.weights / 1e9) for model in MODELS] == [71, 235, 671]


def test_what_is_sent_for_an_ordinary_layer_and_for_experts() -> None:
    ordinary = cluster.sent([Inputs(256, (64,))], 2)
    assert ordinary == {"Hessians": 4 * 256**2, "thresholds": 2 * 4 * (2048 + 1024 + 1024), "weights": 4 * 64 * 256 / 2}
    experts = cluster.sent([Inputs(256, (64,), experts=6, share=0.5)], 2)
    assert experts == {"Hessians": 4 * 256**2 * (6 + 2) / 2, "thresholds": 0.0, "weights": 2 * 6 * 64 * 256 / 2}
    assert set(cluster.sent([Inputs(256, (64,))], 1).values()) == {0.0}


def test_one_process_exchanges_nothing_and_many_share_everything_but_factors_and_files() -> None:
    block = MODELS[0].blocks[0][1]
    alone, many = (cluster.block_time(block, 8192, H100, size) for size in (1, 8))
    assert alone.sums == alone.thresholds == alone.weights == 0
    assert many.factors == alone.factors
    assert many.files == alone.files
    assert (many.forward, many.rows) == pytest.approx((alone.forward / 8, alone.rows / 8))


def test_experts_whose_hessians_do_not_fit_take_more_passes() -> None:
    block = MODELS[2].blocks[-1][1]
    roomy = cluster.block_time(block, 0, replace(H100, memory=1e15), 1)
    assert cluster.block_time(block, 0, H100, 1).forward == pytest.approx(1.5 * roomy.forward)
