"""Every way of training and every mask keeps exactly the zeros that it promised, whatever the layers and the rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import thanos
from thanos.pattern import SemiStructured, parse_pattern
from thanos.recover.model import recover_model
from thanos.recover.options import RecoverOptions, trainable_pattern

pytest.importorskip("accelerate")

FIRST = torch.arange(24)[:, None]
WINDOWS, HELD = 3 + (FIRST + torch.arange(16)) % 12, 3 + (5 * FIRST[:4] + torch.arange(16)) % 12
WAYS = [("weights", "fixed"), ("norms", "fixed"), ("lora", "fixed"), ("weights", "decaying"), ("weights", "acdc")]
FEW: Any = {"max_examples": 25, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def zero(model: Any, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach() == 0


@settings(**FEW)
@given(
    way=st.sampled_from(WAYS),
    start=st.sampled_from(["0.3", "0.5", "2:4", "1:4", "structured:0.25", "2:4 with outliers"]),
    target=st.sampled_from(["0.6", "2:4", None]),
    rate=st.sampled_from([1e-3, 1e-1, 10.0]),
    steps=st.integers(2, 14),
    teacher=st.booleans(),
)
def test_the_zeros_are_those_that_were_promised(
    way: tuple[str, str],
    start: str,
    target: str | None,
    rate: float,
    steps: int,
    teacher: bool,
    tiny_model: Callable[..., Any],
) -> None:
    train, mask = way
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    pattern, _, outliers = start.partition(" with ")
    alpha = 0.1 if outliers else 0.0
    report = thanos.prune_model(model, WINDOWS[:6], pattern, method="magnitude", outlier_fraction=alpha)
    names = [layer.name for layer in report.layers]
    before = {name: zero(model, name) for name in names}
    wanted = None if mask == "fixed" or target is None else trainable_pattern(target)
    if mask != "fixed" and wanted is None:
        wanted = trainable_pattern("2:4") if mask == "decaying" or start.startswith("structured") else None
    asked = RecoverOptions(
        steps=steps, train=train, mask=mask, pattern=wanted, learning_rate=rate, evaluations=4, compute="float32"
    )
    taught = {"teacher": dense if teacher else None, "record": report.to_dict()}
    try:
        done = recover_model(model, WINDOWS, HELD, asked, **taught)
    except ValueError as error:
        if "training came to nothing" in str(error):  # such as a rate at which it diverged before it was sparse
            return
        raise
    for name in names:
        after = zero(model, name)
        assert done.zeros[name] == int(after.sum())
        if mask == "fixed":
            assert bool(after[before[name]].all()), f"{name} lost zeros"
            if train == "norms":
                assert torch.equal(after, before[name])
            continue
        own = parse_pattern(pattern) if wanted is None else wanted
        if isinstance(own, SemiStructured):
            lacking = (after.unflatten(1, (-1, own.m)).sum(-1) < own.n).any(1)
            spared = math.ceil(alpha * len(after)) if isinstance(parse_pattern(pattern), SemiStructured) else 0
            assert int(lacking.sum()) <= spared
        else:
            assert int(after.sum()) >= (int(before[name].sum()) if wanted is None else own.count(after.numel()))  # type: ignore[union-attr]


@pytest.mark.parametrize("mask", ["decaying", "acdc"])
def test_a_dense_model_is_trained_to_a_pattern(mask: str, tiny_model: Callable[..., Any]) -> None:
    dense = tiny_model("gpt2")
    model = copy.deepcopy(dense)
    asked = RecoverOptions(
        steps=20, mask=mask, pattern=SemiStructured(2, 4), learning_rate=3e-3, evaluations=10, share=0.3
    )
    done = recover_model(model, WINDOWS, HELD, asked, teacher=dense)
    assert len(done.zeros) == 12
    for name in done.zeros:
        weight = model.get_submodule(name).weight.detach().T  # of a Conv1D
        assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) == 2).all())
    sparse = [point.sparse for point in done.training.curve]
    assert not sparse[0]
    assert sparse[-1]
    assert all(sparse[sparse.index(True) :]) != (mask == "acdc"), "acdc has dense phases behind sparse ones"


def test_what_fades_is_scaled_down_step_by_step(tiny_model: Callable[..., Any], monkeypatch: Any) -> None:
    from thanos.recover.phases import DecayingMask

    sizes: list[float] = []
    after_step = DecayingMask.after_step

    def watched(mask: DecayingMask, progress: float) -> None:
        after_step(mask, progress)
        places = mask._places
        sizes.append(sum(float(one.weight[one.gone].abs().sum()) for one in places))

    monkeypatch.setattr(DecayingMask, "after_step", watched)
    asked = RecoverOptions(steps=20, mask="decaying", pattern=SemiStructured(2, 4), learning_rate=1e-6)
    recover_model(tiny_model("llama"), WINDOWS, HELD, asked)
    assert all(one > other for one, other in pairwise(sizes[:12]))
    assert sizes[5] == pytest.approx(sizes[0] * 0.5 / (1 - 1 / 12), rel=0.02)
    assert sizes[11:] == [0.0] * 9


@pytest.mark.parametrize("mask", ["decaying", "acdc"])
def test_a_moving_mask_goes_on_where_it_was(mask: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    asked = RecoverOptions(
        steps=20, mask=mask, pattern=SemiStructured(2, 4), learning_rate=3e-3, evaluations=10, save_minutes=0
    )

    class KilledError(Exception):
        pass

    def run(folder: Path, last: int = 99) -> Any:
        def kill(point: Any, share: float) -> None:
            if point.step == last:
                raise KilledError

        model = tiny_model("llama")
        folder.mkdir(exist_ok=True)
        recover_model(model, WINDOWS, HELD, asked, folder=folder, progress=kill)
        return model

    want = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "part", 6)
    have = run(tmp_path / "part")
    for one, other in zip(have.parameters(), want.parameters(), strict=True):
        assert torch.equal(one, other)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "columns": ({"mask": "acdc"}, "structured:0.25", "the zeros of whole columns do not move"),
    "width": ({"mask": "decaying", "pattern": SemiStructured(3, 7)}, "0.5", "needs a width that 7 divides"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_cannot_move_are_refused(case: str, tiny_model: Callable[..., Any]) -> None:
    changes, pattern, reason = REFUSED[case]
    model = tiny_model("llama")
    report = thanos.prune_model(model, WINDOWS[:6], pattern)
    with pytest.raises(ValueError, match=reason):
        recover_model(model, WINDOWS, HELD, RecoverOptions(steps=1, **changes), record=report.to_dict())
    with pytest.raises(ValueError, match="needs a pattern"):
        recover_model(tiny_model("llama"), WINDOWS, HELD, RecoverOptions(steps=1, mask="acdc"))
