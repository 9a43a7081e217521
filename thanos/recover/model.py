"""Train a pruned model's weights back towards what the dense one says, its zeros kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.engine.peers import ALONE, Peers
from thanos.recover.masks import FixedMask, Sparse, check_pattern, find_sparse, parameter_masks, wanted_pattern
from thanos.recover.options import TRAINABLE, RecoverOptions
from thanos.recover.phases import AlternatingMask, DecayingMask
from thanos.recover.student import Student, fast_dtype
from thanos.recover.training import Point, Training, train
from thanos.recover.windows import check_windows, with_repeats


@dataclass(frozen=True)
class Recovered:
    """What training did to a model.

    Attributes:
        training: how it went.
        parameters: the names of those that changed; none where nothing was better than the start.
        zeros: of each layer whose zeros were kept, how many of its weights are zero.
        dtype: of forwards and backwards.
    """

    training: Training
    parameters: tuple[str, ...]
    zeros: dict[str, int]
    dtype: torch.dtype


def recover_model(
    model: nn.Module,
    windows: Tensor,
    held_out: Tensor,
    options: RecoverOptions,
    *,
    teacher: nn.Module | None = None,
    record: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    progress: Callable[[Point, float], None] | None = None,
    peers: Peers = ALONE,
) -> Recovered:
    """Train a pruned model, in place, and keep what is best on windows held out.

    Args:
        model: a causal language model, pruned; its zeros are found in its layers.
        windows, held_out: (N, S) and (n, S), int64: token ids to train and to measure on.
        options: what is trained, and for how long.
        teacher: the dense model, of the same vocabulary; None trains by the language model's own loss.
        record: of the pruning, ``pruning.json``: names the layers whose zeros are kept.
        device: of the training; None is the model's.
        folder: for checkpoints, which an interrupted run goes on from; None keeps none.
        progress: called at every measurement with how far it is, from 0 to 1.
        peers: the processes that torchrun started, each of which calls this with the same arguments and a ``folder``
            that all see; a step takes a batch of each.

    Raises:
        ValueError: there are no zeros to keep, or no such pattern; too few windows; a teacher of another vocabulary;
            or training came to nothing.
    """
    check_windows(windows, held_out, options.batch_size * peers.size)
    check_teacher(model, teacher)
    windows = with_repeats(windows, options.repeats)
    sparse = find_sparse(model, record or {}, options)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = fast_dtype(where, options.compute)
    masks = parameter_masks(sparse, model) if options.mask == "fixed" else {}
    student = Student(
        model,
        options.train,
        masks,
        teacher=teacher,
        share=options.share,
        rank=options.rank,
        seed=options.seed,
        dtype=dtype,
        device=where,
    )
    pattern = options.pattern if options.mask == "fixed" else wanted_pattern(record or {}, options)
    mask = _mask(student, model, sparse, masks, options, pattern)
    if folder is None:
        if peers.size > 1:
            raise ValueError("several processes need a folder for checkpoints that all of them see")
        with tempfile.TemporaryDirectory(prefix="thanos-") as own:
            training = train(student, mask, windows, held_out, options, Path(own), progress=progress)
    else:
        training = train(student, mask, windows, held_out, options, folder, progress=progress, peers=peers)
    if training.best is None:
        raise ValueError(f"training came to nothing: {training.note or 'no weights with their zeros were measured'}")
    if options.mask != "fixed" and training.best:
        masks = mask.gone
    names = _write(model, student, masks) if training.best else ()
    return Recovered(training, names, _checked(model, sparse, masks, pattern), dtype)


def check_teacher(model: Any, teacher: Any) -> None:
    """Raise ValueError where a teacher's predictions are of other tokens."""
    if teacher is None:
        return
    own, other = (one.config.get_text_config().vocab_size for one in (model, teacher))
    if own != other:
        raise ValueError(
            f"the teacher has another vocabulary, of {other} tokens, than the model, of {own}; take the dense model "
            "that it was pruned from"
        )


def _mask(
    student: Student,
    model: nn.Module,
    sparse: list[Sparse],
    masks: Mapping[str, Tensor],
    options: RecoverOptions,
    pattern: TRAINABLE | None,
) -> FixedMask:
    if options.mask == "fixed":
        where = next(student.parameters()).device
        return FixedMask(student.values, {name: one.to(where) for name, one in masks.items()})
    moving = DecayingMask if options.mask == "decaying" else AlternatingMask
    return moving(student.values, model, sparse, pattern)


def _write(model: nn.Module, student: Student, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Put what was trained into the model, in its own dtype."""
    with torch.no_grad():
        for name, value in student.effective().items():
            parameter = model.get_parameter(name)
            parameter.copy_(value)
            if name in masks:
                parameter.masked_fill_(masks[name].to(parameter.device), 0)
    return tuple(sorted(student.names))


def _checked(
    model: nn.Module, sparse: list[Sparse], masks: Mapping[str, Tensor], pattern: TRAINABLE | None
) -> dict[str, int]:
    """The zeros of each layer, counted, after a last look at what was promised."""
    for name, gone in masks.items():
        if bool(model.get_parameter(name)[gone.to(model.get_parameter(name).device)].any()):
            raise RuntimeError(f"{name} lost zeros in training")
    found = {}
    for one in sparse:
        zero = one.layer.weight == 0
        if pattern is not None:
            check_pattern(one.layer.name, zero, one.exempt, pattern)
        elif int(zero.sum()) < int(one.gone.sum()):
            raise RuntimeError(f"{one.layer.name} lost zeros in training")
        found[one.layer.name] = int(zero.sum())
    return found
