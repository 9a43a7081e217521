"""Training a pruned model: its zeros stay, its loss falls, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import thanos
from thanos.recover.loss import Head, logit_losses, token_losses
from thanos.recover.model import recover_model
from thanos.recover.options import TRAINED, RecoverOptions
from thanos.recover.windows import with_repeats

pytest.importorskip("accelerate")


def counted(rows: int, seed: int) -> torch.Tensor:
    """(rows, 20) tokens, each one more than the one before, modulo 12: there is something to learn."""
    first = torch.randint(12, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return 3 + (first + torch.arange(20)) % 12


WINDOWS, HELD = counted(24, 2), counted(4, 3)


def naive_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor, wanted: torch.Tensor, share: float) -> Any:
    logs, known = head(hidden).log_softmax(1), wanted.log_softmax(1)
    distance = (known.exp() * (known - logs)).sum(1).mean()
    return share * distance + (1 - share) * torch.nn.functional.nll_loss(logs, targets)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_definition(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos.recover.loss._NUMBERS", 16 * 50)  # several parts, the last one shorter
    monkeypatch.setattr("thanos.recover.loss._CACHED", 3 * 50)  # and each of them in turn
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=draw).requires_grad_()
    head = Head(torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw))
    targets, wanted = torch.randint(50, (37,), generator=draw), torch.randn(37, 50, generator=draw)
    want = naive_loss(hidden, head, targets, wanted, share)
    (gradient,) = torch.autograd.grad(want, hidden)
    have = token_losses(hidden, head, targets, torch.clone, wanted, share)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(torch.autograd.grad(2 * have, hidden)[0], 2 * gradient)
    logits = head(hidden.detach()).requires_grad_()
    have = logit_losses(logits, targets, torch.clone, wanted, share)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(torch.autograd.grad(have, logits)[0] @ head.weight, gradient)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("length", [2, 7, 8])
@pytest.mark.parametrize("begin", [0, 1])
def test_repeats_are_a_share_of_the_windows_and_say_their_first_half_twice(
    share: float, length: int, begin: int
) -> None:
    own = torch.arange(9 * length).view(9, length)
    own[:, :begin] = 1000  # the token that texts begin with
    windows = with_repeats(own, share)
    assert torch.equal(windows[:9], own)
    added = windows[9:]
    assert len(added) == {0.0: 0, 0.25: 3, 0.5: 9}[share]
    middle = begin + -(-(length - begin) // 2)
    assert torch.equal(added[:, middle:], added[:, begin : begin + length - middle])
    sources = torch.arange(0, 9, 9 // max(1, len(added)))[: len(added)]
    assert torch.equal(added[:, :middle], own[sources, :middle]), "evenly spaced"


@pytest.mark.parametrize("share", [-0.1, 0.6, float("nan")])
def test_a_share_of_repeats_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="repeats must be from 0 to"):
        RecoverOptions(steps=1, repeats=share)


def test_repeats_are_trained_on(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def train(*arguments: Any, **_: Any) -> Any:
        seen.append(arguments[2])
        raise InterruptedError

    monkeypatch.setattr("thanos.recover.model.train", train)
    model = tiny_model("llama")
    record = thanos.prune_model(model, WINDOWS[:8], "0.5").to_dict()
    for share in (0.0, 0.25):
        with pytest.raises(InterruptedError):
            recover_model(model, WINDOWS, HELD, RecoverOptions(steps=1, repeats=share), record=record)
    assert [len(one) for one in seen] == [24, 32]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("train", TRAINED)
def test_zeros_stay_and_the_loss_falls(train: str, family: str, tiny_model: Callable[..., Any]) -> None:
    dense = tiny_model(family)
    model = copy.deepcopy(dense)
    options: dict[str, Any] = {"outlier_fraction": 0.1} if family == "llama" else {}
    report = thanos.prune_model(model, WINDOWS[:8], "2:4", **options)
    names = {f"{layer.name}.weight" for layer in report.layers}
    before = {name: one.clone() for name, one in model.named_parameters()}
    asked = RecoverOptions(steps=12, train=train, learning_rate=3e-3, share=0.3, compute="float32")
    done = recover_model(model, WINDOWS, HELD, asked, teacher=dense, record=report.to_dict())
    losses = [point.held_out for point in done.training.curve]
    assert done.training.least < losses[0]
    for name, one in model.named_parameters():
        if name in names:
            assert torch.equal(one == 0, before[name] == 0), name
        if train == "norms" and one.dim() > 1:
            assert torch.equal(one, before[name]), name
        assert one.dtype == before[name].dtype
        assert torch.equal(one, before[name]) or name in done.parameters
    assert done.zeros == {layer.name: layer.zeros for layer in report.layers}
    with torch.no_grad():
        logits = model(HELD).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, HELD[:, 1:].flatten())
    assert float(loss) == pytest.approx(done.training.least, rel=1e-4), "what is kept is what was measured"


def test_a_rate_that_is_too_high_is_stopped_and_the_best_is_kept(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    report = thanos.prune_model(model, WINDOWS[:8], "0.5")
    # A model that knows something: what diverges may end at equal chances for all tokens, the start of a random one.
    recover_model(model, WINDOWS, HELD, RecoverOptions(steps=40, learning_rate=1.0), record=report.to_dict())
    before = {name: one.clone() for name, one in model.named_parameters()}
    asked = RecoverOptions(steps=40, learning_rate=3e3, evaluations=8)
    done = recover_model(model, WINDOWS, HELD, asked, record=report.to_dict())
    assert done.training.note is not None
    assert "learning rate" in done.training.note
    assert done.training.steps < 40
    assert done.training.best == 0
    assert done.parameters == ()
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_a_smaller_model_is_trained_without_a_mask(tiny_model: Callable[..., Any]) -> None:
    shrunk = thanos.shrink_model(tiny_model("llama"), WINDOWS[:8], "channels:0.3", multiple=4)
    asked = RecoverOptions(steps=8, learning_rate=3e-3)
    done = recover_model(shrunk.model, WINDOWS, HELD, asked, record=shrunk.report.to_dict())
    assert done.zeros == {}
    assert done.training.best


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no zeros": ({}, "no zeros to keep"),
    "no text": ({"batch_size": 50}, "too little text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tiny_model: Callable[..., Any]) -> None:
    changes, reason = REFUSED[case]
    asked = dataclasses.replace(RecoverOptions(steps=1), **changes)
    with pytest.raises(ValueError, match=reason):
        recover_model(tiny_model("llama"), WINDOWS, HELD, asked)


def test_a_pattern_that_the_model_does_not_have_is_refused(tiny_model: Callable[..., Any]) -> None:
    from thanos.pattern import SemiStructured

    model = tiny_model("llama")
    report = thanos.prune_model(model, WINDOWS[:8], "0.5")
    asked = RecoverOptions(steps=1, pattern=SemiStructured(2, 4))
    with pytest.raises(ValueError, match="does not have the pattern 2:4: it is broken in"):
        recover_model(model, WINDOWS, HELD, asked, record=report.to_dict())


def test_a_teacher_of_another_vocabulary_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="another vocabulary, of 97 tokens"):
        recover_model(model, WINDOWS, HELD, RecoverOptions(steps=1), teacher=tiny_model("llama", vocab_size=97))


@pytest.mark.parametrize("train", TRAINED)
def test_a_run_that_was_interrupted_comes_to_the_same_end(
    train: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    pruned = tiny_model("llama")
    record = thanos.prune_model(pruned, WINDOWS[:8], "0.5").to_dict()
    asked = RecoverOptions(steps=12, train=train, learning_rate=3e-3, save_minutes=0)

    class KilledError(Exception):
        pass

    def kill(point: Any, share: float) -> None:
        if point.step == 6:
            raise KilledError

    def run(folder: Path, progress: Any = None) -> tuple[Any, Any]:
        model = copy.deepcopy(pruned)
        folder.mkdir(exist_ok=True)
        done = recover_model(model, WINDOWS, HELD, asked, record=record, folder=folder, progress=progress)
        return model, done.training

    want, whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "part", kill)
    have, rest = run(tmp_path / "part")
    assert [(point.step, point.held_out) for point in rest.curve] == [
        (point.step, point.held_out) for point in whole.curve
    ]
    for one, other in zip(have.parameters(), want.parameters(), strict=True):
        assert torch.equal(one, other)
