"""Depth that follows the input: for each kind of prompt its own set of blocks to pass over (after IG-Pruning).

The model stays whole. A prompt's kind is the cluster whose centre lies nearest to the mean of its token embeddings. It
is decided when a prompt is first seen and kept with its cache, so every later token of it runs through the same blocks.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thanos.pattern import Axis
from thanos.shrink.depth import depth_to_remove
from thanos.shrink.goals import whole_count
from thanos.shrink.probe import check_samples
from thanos.shrink.skip import Chain, hidden_argument
from thanos.walk.decoder import find_decoder

FILE_NAME = "depth_sets.json"
_MARK = "_thanos_kinds"
_PROBE = 4


@dataclass(frozen=True)
class DepthSets:
    """Sets of blocks, one for each kind of prompt.

    Attributes:
        centres: (kinds, width), float32: mean embeddings.
        removed: of each kind the numbers of the blocks that are passed over.
        samples: of each kind how many calibration samples it was made from.
    """

    centres: Tensor
    removed: list[list[int]]
    samples: list[int]

    def kinds(self, means: Tensor) -> Tensor:
        """(n,), int64: the nearest centre to each mean embedding (n, width)."""
        return torch.cdist(means.float(), self.centres.to(means.device)).argmin(1)

    def write(self, folder: Path) -> None:
        """Write ``depth_sets.json`` into ``folder``."""
        values = {"centres": self.centres.tolist(), "removed": self.removed, "samples": self.samples}
        (folder / FILE_NAME).write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_depth_sets(folder: Path) -> DepthSets:
    """What :meth:`DepthSets.write` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        centres = torch.tensor(values["centres"], dtype=torch.float32, device="cpu")
        removed = [[int(index) for index in some] for some in values["removed"]]
        sets = DepthSets(centres, removed, [int(count) for count in values["samples"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / FILE_NAME} is damaged: {error}") from error
    if centres.dim() != 2 or len(removed) != len(centres):
        raise ValueError(f"{folder / FILE_NAME} is damaged: {len(removed)} sets for {len(centres)} centres")
    return sets


def find_depth_sets(
    model: Any, samples: Tensor, axis: Axis, *, seed: int = 0, tell: Callable[[int, int], None] | None = None
) -> DepthSets:
    """Cluster the samples by their mean embeddings, and choose for each cluster the blocks that it can do without.

    The first block, and the first of each type of layer, always stay: the length of a cache is read from them.

    Args:
        model: in evaluation mode.
        samples: (N, S), token ids.
        axis: ``depth:6@4``.
        seed: of k-means.
        tell: as for :func:`depth_to_remove`, of the cluster at hand.

    Raises:
        ValueError: fewer samples than sets, a number of blocks that cannot go, or scikit-learn is missing.
    """
    check_depth_sets(model, samples, axis)
    from sklearn.cluster import KMeans

    decoder, sets = find_decoder(model), axis.sets or 0
    protected = _protected(model.config.get_text_config())
    count = whole_count(axis, len(decoder.blocks), "block")
    with torch.no_grad():
        means = _mean_embeddings(model, samples)
        found = KMeans(sets, n_init=10, random_state=seed).fit(means.cpu().numpy())
        labels = torch.from_numpy(found.labels_)
        removed = [
            depth_to_remove(model, decoder, samples[labels == kind], count, protected, tell=tell).blocks
            for kind in range(sets)
        ]
    centres = torch.from_numpy(found.cluster_centers_).float()
    return DepthSets(centres, removed, labels.bincount(minlength=sets).tolist())


def check_depth_sets(model: Any, samples: Tensor, axis: Axis) -> str:
    """What :func:`find_depth_sets` will do, in words. Errors as there."""
    check_samples(model, samples)
    blocks, protected = len(find_decoder(model).blocks), _protected(model.config.get_text_config())
    count = whole_count(axis, blocks, "block")
    if count > blocks - len(protected):
        raise ValueError(f"{axis}: {len(protected)} of {blocks} blocks must stay; ask for less")
    if len(samples) < (axis.sets or 0):
        raise ValueError(f"{axis} needs at least {axis.sets} samples, not {len(samples)}")
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(f"{axis} clusters its samples with scikit-learn: pip install scikit-learn")
    return f"{axis}: {blocks} blocks stay, of which each of {axis.sets} kinds of input passes over {count}"


def _protected(config: Any) -> list[int]:
    types = getattr(config, "layer_types", None) or [""]
    return sorted({types.index(kind) for kind in types} | {0})


def _mean_embeddings(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, width), float32, of token ids (n, S); padding by ``mask`` (n, S) does not count."""
    embedding = model.get_input_embeddings()
    values = embedding(tokens.to(embedding.weight.device)).float()
    return _masked_mean(values, mask)


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.dim() != 2 or mask.shape != values.shape[:2]:
        return values.mean(1)
    weights = mask.to(values)[..., None]
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)


def follow_input(model: Any, sets: DepthSets) -> Any:
    """Make ``model`` pass over the blocks of each prompt's set; returned for convenience.

    In a batch of prompts of different kinds a block runs where any prompt needs it, and the others keep their hidden
    states. ``model.forward`` and the blocks' are replaced on this instance.
    """
    blocks = find_decoder(model).blocks
    with torch.no_grad():
        chain = Chain(model, blocks, torch.zeros((1, _PROBE), dtype=torch.int64, device="cpu"))
    stays = torch.ones(len(sets.centres), len(blocks), dtype=torch.bool, device="cpu")
    for kind, some in enumerate(sets.removed):
        stays[kind, some] = False
    current: list[Tensor] = []
    for index, block in enumerate(blocks):
        _pass_over(block, stays[:, index], chain.returns_more(index), current)
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        kinds = getattr(cache, _MARK, None)
        if cache is None or kinds is None or not cache.get_seq_length():
            kinds = _kinds(model, sets, args, kwargs)
        current.append(kinds)
        try:
            output = own(*args, **kwargs)
        finally:
            current.pop()
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _MARK, kinds)
        return output

    model.forward = forward
    return model


def _kinds(model: Any, sets: DepthSets, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    mask = kwargs.get("attention_mask")
    tokens = args[0] if args else kwargs.get("input_ids")
    with torch.no_grad():
        if tokens is not None:
            return sets.kinds(_mean_embeddings(model, tokens, mask)).cpu()
        return sets.kinds(_masked_mean(kwargs["inputs_embeds"].float(), mask)).cpu()


def _pass_over(block: nn.Module, stays: Tensor, more: int, current: list[Tensor]) -> None:
    """Make a block leave alone the rows of a batch whose kind, one of ``stays`` (kinds,), passes over it."""
    own = block.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = stays[current[-1]] if current else torch.ones(1, dtype=torch.bool, device="cpu")
        if bool(rows.all()):
            return own(*args, **kwargs)
        hidden = hidden_argument(args, kwargs)
        if not bool(rows.any()):
            return hidden if more < 0 else (hidden, *[None] * more)
        output = own(*args, **kwargs)
        new = output if more < 0 else output[0]
        new = torch.where(rows.to(new.device)[:, None, None], new, hidden)
        return new if more < 0 else (new, *output[1:])

    block.forward = forward


def load_guided(folder: str | Path, *, device: str | torch.device | None = None) -> Any:
    """The whole model of ``folder``, following its ``depth_sets.json``, in evaluation mode.

    Raises:
        ValueError: the model cannot be read, or the sets do not fit it.
    """
    from thanos.checkpoint import load_model

    sets = read_depth_sets(Path(folder))
    model = load_model(str(folder), device=device)
    blocks = len(find_decoder(model).blocks)
    width = model.get_input_embeddings().weight.shape[1]
    if sets.centres.shape[1] != width or not all(0 <= index < blocks for some in sets.removed for index in some):
        raise ValueError(f"{Path(folder) / FILE_NAME} belongs to another model: this one has {blocks} blocks")
    return follow_input(model, sets)
