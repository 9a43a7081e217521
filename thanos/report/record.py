"""What a pruning run did, layer by layer: the record that ``pruning.json`` keeps."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thanos.report.machine import versions

FILE_NAME = "pruning.json"


@dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Attributes:
        name: full name in the model.
        shape: (c, b), out features x in features.
        zeros: how many of its weights are zero, counted: those removed and those that were zero before.
        sparsity: the same as a share.
        loss: ``tr((W' - W) H (W' - W).T)``, the mean squared output error per token.
        relative_loss: ``loss`` over the mean squared output ``tr(W H W.T)``.
        damping: the damping used; more than was asked for where a factorisation failed.
        shared_with: the first layer that received the very same input, whose Hessian this one used; None if its own.
        tokens: calibration tokens its Hessian was taken from; those routed to it, for an expert.
        pool_share: for an expert, the share that the tokens of all experts beside it have in its Hessian; 1 where no
            token reached it.
        own_target: where corrected targets were asked for, why this layer was pruned towards its own weight; None
            where it was not. Losses are to the target, and relative to the target's output.
        seconds: time per step: hessian, factor, select, solve, update, loss.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    sparsity: float
    loss: float
    relative_loss: float
    damping: float
    shared_with: str | None
    tokens: int
    seconds: dict[str, float]
    pool_share: float = 0.0
    own_target: str | None = None


@dataclass(frozen=True)
class BlockReport:
    """One block's reconstruction.

    Attributes:
        block: its number, in the order in which blocks run.
        before, after: ``mean |y - y'|^2 / mean |y'|^2`` of the samples held out, y' the dense model's output.
        epochs: that were run.
        best: the epoch whose weights were kept; 0 is the start.
        learning_rate: relative to the root mean square of each parameter.
        note: why the start was kept, where something went wrong.
        parameters: the full names of those that were changed.
        seconds: what it took.
    """

    block: int
    before: float
    after: float
    epochs: int
    best: int
    learning_rate: float
    note: str | None
    parameters: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ModelReport:
    """A whole run.

    Attributes:
        method, pattern: what was asked for.
        nominal_sparsity: the pattern's.
        effective_sparsity: zeros over all weights of the blocks (all parameters but vectors), counted in the pruned
            model, those left dense included.
        options: every option of the run.
        layers: the pruned layers, in the order of pruning.
        excluded: layers left dense because they were excluded.
        dense: layers left dense for another reason, with the reason.
        passes: forwards per block: 1 or 2.
        seconds: of the walk: forward, hessian, prune, other, total.
        calibration: where the samples came from (see :class:`thanos.text.samples.Samples`).
        perplexity: by name (``dense``, ``pruned``), with the text and the sequence length, if evaluated.
        command: what a person ran, if it was a command.
        size: ``parameters`` and ``bytes`` of the saved weights, each ``before`` and ``after``, if it was saved.
        blocks: the reconstructions of the blocks, where asked for. Layers' losses are those before it.
    """

    method: str
    pattern: str
    nominal_sparsity: float
    effective_sparsity: float
    options: dict[str, Any]
    layers: list[LayerReport]
    excluded: list[str]
    dense: dict[str, str]
    passes: int
    seconds: dict[str, float]
    calibration: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    size: dict[str, Any] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that made them."""
        return {**dataclasses.asdict(self), "versions": versions()}

    def write(self, folder: Path) -> None:
        """Write ``pruning.json`` into ``folder``."""
        text = json.dumps(json_numbers(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def json_numbers(value: Any) -> Any:
    """The value with null for NaN and infinity, such as the perplexity of a model that overflows."""
    if isinstance(value, dict):
        return {key: json_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_numbers(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
