"""What the walk knows between blocks, what it waits for, and where its time goes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thanos import prune_model
from thanos.options import METHODS, WalkOptions
from thanos.walk.clock import Clock
from thanos.walk.decoder import find_decoder
from thanos.walk.hessians import InputHessian
from thanos.walk.plan import Plan, make_plan
from thanos.walk.replay import Capture
from thanos.walk.store import MemoryStore
from thanos.walk.walk import State, Walk


def begun(model: Any, samples: Tensor, **options: Any) -> tuple[Walk, State]:
    """A walk in front of its first block."""
    chosen = WalkOptions.of("0.5", **options)
    decoder = find_decoder(model)
    clock = Clock(torch.device("cpu"))
    plan, hidden = make_plan(model, decoder, samples, chosen, clock)
    names = frozenset(layer.name for block in decoder.layers for layer in block)
    return Walk(plan, chosen, names, clock, None), State(hidden)


@pytest.mark.parametrize("passes", [1, 2])
@torch.no_grad()
def test_a_walk_goes_on_from_a_state_that_was_written_down(
    passes: int, tiny_model: Callable[..., Any], token_samples: Tensor
) -> None:
    whole, parted = tiny_model("llama"), tiny_model("llama")
    prune_model(whole, token_samples, "0.5", passes=passes, batch_size=4)
    walk, state = begun(parted, token_samples, passes=passes, batch_size=4)
    while state.block < len(walk.plan.store):
        walk.prune_block(state)
        memory = io.BytesIO()
        torch.save(state, memory)
        memory.seek(0)
        walk, _ = begun(parted, token_samples, passes=passes, batch_size=4)
        state = torch.load(memory, weights_only=False)
    assert len(state.reports) == 21
    for name, value in parted.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_the_walk_waits_for_its_device_once_a_layer(
    method: str, passes: int, tiny_model: Callable[..., Any], token_samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, which hold no data, whatever else asks for a value or for a copy elsewhere fails."""
    waits: list[int] = []

    def read(*values: Tensor) -> list[float]:
        assert all(value.device.type == "meta" for value in values)
        waits.append(len(values))
        return [0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]

    model = tiny_model("llama")
    capture = Capture(model, find_decoder(model), token_samples)
    hidden, calls = capture(token_samples)
    store = MemoryStore([block.to("meta") for block in capture.decoder.blocks])
    monkeypatch.setattr("thanos.engine.layer.read", read)
    monkeypatch.setattr("thanos_kernels.triton.refusal", lambda *_, **__: None)
    options = WalkOptions.of("0.5", method=method, outlier_fraction=0.1, backend="triton", block_size=16)
    names = frozenset(layer.name for block in capture.decoder.layers for layer in block)
    device = torch.device("meta")
    walk = Walk(Plan(store, capture.decoder, [calls], passes, device, 1 << 30), options, names, Clock(device), None)
    state = State([hidden.to("meta")])
    while state.block < len(store):
        walk.prune_block(state)
    assert len(state.reports) == 21
    assert waits == [7] * 21


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 20),
    parts=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_merged_hessians_of_parts_are_the_hessian_of_the_whole(width: int, parts: list[list[int]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    whole, merged = InputHessian("x"), InputHessian("x")
    for batches in parts:
        part = InputHessian("x")
        for tokens in batches:
            inputs = torch.randn(tokens, width, generator=draw, dtype=torch.float64)
            whole.add(inputs, "reference")
            part.add(inputs, "reference")
        merged.merge(part)
    assert (merged.tokens, merged.calls) == (whole.tokens, whole.calls)
    if whole.hessian is None:
        assert merged.hessian is None
    else:
        torch.testing.assert_close(merged.hessian, whole.hessian)


def test_the_clock_gives_each_moment_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("thanos.walk.clock.time.perf_counter", lambda: next(now))
    clock = Clock(torch.device("cpu"))
    with clock("forward"), clock("hessian"):
        pass
    assert clock.stop() == {"forward": 2.0 + 8.0, "hessian": 4.0, "prune": 0.0, "other": 1.0 + 16.0, "total": 31.0}


def test_every_part_of_a_real_walk_takes_time(tiny_model: Callable[..., Any], token_samples: Tensor) -> None:
    report = prune_model(tiny_model("llama"), token_samples, "0.5")
    assert all(report.seconds[name] > 0 for name in ("forward", "hessian", "prune", "other"))
    first = report.layers[0]
    assert first.seconds.keys() == {"hessian", "factor", "select", "solve", "update", "loss"}
    assert all(seconds > 0 for seconds in first.seconds.values())
