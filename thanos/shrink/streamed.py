"""Fewer blocks for a model that lies in its files: each block is in memory only while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thanos.checkpoint import BlockFiles, save_without_blocks, updates_source
from thanos.pattern import Shrink
from thanos.report import ModelReport
from thanos.shrink.configuration import Shape, smaller_config
from thanos.shrink.depth import Sweep, depth_to_remove
from thanos.shrink.goals import whole_count
from thanos.shrink.options import ShrinkOptions
from thanos.shrink.probe import block_prefix, check_nothing_shared, check_samples
from thanos.shrink.rebuild import PROBE, compare, cut_tensors
from thanos.walk.decoder import Decoder, find_decoder
from thanos.walk.events import Progress
from thanos.walk.memory import freed_memory_returned
from thanos.walk.store import from_files, move_loaded
from thanos.walk.stream import load_streamed


class StreamedDepth:
    """As :class:`thanos.shrink.ShrinkPlan`, for the removal of blocks alone: checked and not yet done.

    Args:
        model, files: of :func:`thanos.walk.stream.load_streamed`.
        source: the model's directory.
        samples: (N, S), token ids.
        pattern: of depth alone, for good.
        options: as there, by name.

    Attributes:
        became: what was asked and what it becomes, in words.

    Raises:
        ValueError: as there, or the model is to be saved in another dtype than its files have.
    """

    def __init__(
        self, model: Any, files: BlockFiles, source: Path, samples: Tensor, pattern: Shrink, **options: Any
    ) -> None:
        axis = pattern.axis("depth")
        if axis is None or axis.sets or len(pattern.axes) > 1:
            raise ValueError(f"pattern {pattern} needs the model in memory; only depth by itself is streamed")
        if not updates_source(model, source, ()):
            raise ValueError(f"a streamed model keeps its dtype: leave out --dtype, or read {source} as a whole")
        self._options = ShrinkOptions(**options)
        self._options.check(pattern)
        check_samples(model, samples)
        self._model, self._files, self._source, self._samples = model, files, source, samples
        self._pattern = pattern
        self._decoder = find_decoder(model)
        check_nothing_shared(model, self._decoder)
        self._prefix = block_prefix(model, self._decoder.blocks)
        total = len(self._decoder.blocks)
        self._count = whole_count(axis, total, "block")
        self._config(tuple(range(total - self._count)))
        self.became = [f"{axis}: {total} blocks become {total - self._count}"]
        self._staying: tuple[int, ...] = ()
        self._wanted: Tensor | None = None

    def _config(self, staying: tuple[int, ...]) -> Any:
        tensors = cut_tensors(self._model.state_dict(), self._prefix, staying, {}, shapes_only=True)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return smaller_config(self._model, Shape(blocks=staying), shapes)

    def run(self, progress: Callable[[Progress], None] | None = None) -> ModelReport:
        """Choose the blocks, once."""
        begin = time.perf_counter()
        device = torch.device(self._options.device or "cpu")
        move_loaded(self._model, device)

        def tell(done: int, total: int) -> None:
            if progress is not None:
                name, seconds = f"{self._prefix}: blocks to remove", time.perf_counter() - begin
                progress(Progress(0, len(self._decoder.blocks), name, done, total, None, seconds))

        stores = from_files(self._files)
        with torch.no_grad(), freed_memory_returned():
            common: Any = {"device": device, "stores": stores}
            removed = depth_to_remove(self._model, self._decoder, self._samples, self._count, tell=tell, **common)
            probe = self._samples[:1, :PROBE]
            sweep = Sweep(self._model, self._decoder, probe, device, stores)
            self._wanted = sweep.logits(probe, removed.blocks)
        blocks = range(len(self._decoder.blocks))
        self._staying = tuple(index for index in blocks if index not in removed.blocks)
        share = 1 - _weights(self._decoder, self._staying) / _weights(self._decoder, tuple(blocks))
        seconds = time.perf_counter() - begin
        return ModelReport(
            method=self._options.importance,
            pattern=str(self._pattern),
            nominal_sparsity=share,
            effective_sparsity=share,
            options={
                **self._options.record(),
                "device": str(device),
                "became": self.became,
                "removed_blocks": removed.blocks,
                "divergences": removed.divergences,
            },
            layers=[],
            excluded=[],
            dense={},
            passes=1,
            seconds={"depth": seconds, "other": 0.0, "total": seconds},
        )

    def save(self, folder: Path) -> None:
        """Write the smaller model, and compare its logits on a few tokens with those without the blocks.

        Raises:
            RuntimeError: they differ by more than rounding.
        """
        assert self._wanted is not None
        config = self._config(self._staying)
        save_without_blocks(self._model, config, self._source, self._prefix, self._staying, folder)
        smaller, files = load_streamed(str(folder))
        device = torch.device(self._options.device or "cpu")
        move_loaded(smaller, device)
        probe = self._samples[:1, :PROBE]
        with torch.no_grad(), freed_memory_returned():
            found = Sweep(smaller, find_decoder(smaller), probe, device, from_files(files)).logits(probe, ())
        compare(self._wanted, found, smaller)


def _weights(decoder: Decoder, blocks: tuple[int, ...]) -> int:
    return sum(layer.weight.numel() for index in blocks for layer in decoder.layers[index])
