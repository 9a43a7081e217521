"""Models larger than memory: everything but the blocks is loaded, and a block's tensors are read when its turn comes.

Transformers itself builds the model, on the meta device, and converts what is read: its loader is called once for the
names and shapes of all tensors, which tells what is missing, and then for parts of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from thanos.checkpoint.conversion import can_convert, one_thread, targets
from thanos.checkpoint.reading import is_gguf, load_model
from thanos.checkpoint.update import Place, tensor_places

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class FileTensor:
    """A tensor in a safetensors file, read when Transformers slices it."""

    def __init__(self, name: str, place: Place, changed: int) -> None:
        self._name, self._place, self._changed = name, place, changed

    def __getitem__(self, _: Any) -> Tensor:
        """Read it.

        Raises:
            ValueError: its file is missing, has been changed, or is truncated.
        """
        place = self._place
        tensor = torch.empty(place.shape, dtype=_DTYPES[place.dtype], device="cpu")
        try:
            with place.file.open("rb") as stream:
                changed = place.file.stat().st_mtime_ns != self._changed
                stream.seek(place.begin)
                content = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
                read = stream.readinto(content) if tensor.numel() else 0
        except FileNotFoundError:
            raise ValueError(f"the model's file {place.file} is not there any more") from None
        if changed or read != tensor.nbytes:
            what = "was changed while it was in use" if changed else f"is truncated: it ends within {self._name}"
            raise ValueError(f"the model's file {place.file} {what}")
        return tensor

    def meta(self) -> Tensor:
        """Its shape and dtype alone."""
        return torch.empty(self._place.shape, dtype=_DTYPES[self._place.dtype], device="meta")


class BlockFiles:
    """Where the tensors of a model's blocks are, and how they come into the model.

    Args:
        model: on the meta device.
        files: the checkpoint's.
        config: what Transformers' loader is given.
        blocks: the modules that stay in the files.
    """

    def __init__(self, model: Any, files: Sequence[Path], config: Any, blocks: Sequence[nn.Module]) -> None:
        changed = {file: file.stat().st_mtime_ns for file in files}
        self._tensors = {n: FileTensor(n, place, changed[place.file]) for n, place in tensor_places(files).items()}
        unknown = [name for name, place in tensor_places(files).items() if place.dtype not in _DTYPES]
        if unknown:
            raise ValueError(f"{unknown[0]} is of a kind that cannot be read block by block; pass --stream no")
        self._model, self._config = model, config
        names = {id(module): name for name, module in model.named_modules()}
        self._prefixes = {id(block): f"{names[id(block)]}." for block in blocks}
        self._loaded: dict[int, list[tuple[nn.Module, str]]] = {}
        self._inside: dict[str, list[str]] = {}

    def load_outside(self) -> Any:
        """Load what is in no block; returns what Transformers says of all tensors."""
        mapping = self._config.weight_mapping or []
        places = targets(self._model, self._tensors, mapping)
        info = self._convert({name: tensor.meta() for name, tensor in self._tensors.items()}, "meta", keep=True)
        outside: list[str] = []
        for name, target in places.items():
            prefix = next((one for one in self._prefixes.values() if target.parameter.startswith(one)), None)
            (outside if prefix is None else self._inside.setdefault(prefix, [])).append(name)
        self._convert({name: self._tensors[name] for name in outside}, "cpu")
        return info

    def load(self, block: nn.Module) -> None:
        """Read a block's tensors into the model, on the CPU."""
        key = id(block)
        waiting = [
            (module, name)
            for module in block.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and tensor.is_meta
        ]
        if waiting:
            self._loaded[key] = waiting
            names = self._inside.get(self._prefixes[key], [])
            self._convert({name: self._tensors[name] for name in names}, "cpu")

    def drop(self, block: nn.Module) -> None:
        """Forget the tensors of a block that were read."""
        for module, name in self._loaded.pop(id(block), []):
            tensor = getattr(module, name)
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty)

    def _convert(self, tensors: Mapping[str, Any], device: str, keep: bool = False) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        conversions = getattr(self._model, "_weight_conversions", None)
        config = dataclasses.replace(self._config, device_map={"": device})
        with one_thread():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        if not keep:
            self._model._weight_conversions = conversions
        return info


def load_skeleton(
    model: str,
    blocks: Callable[[Any], Sequence[nn.Module]],
    dtype: torch.dtype | None = None,
    *,
    config: Any = None,
    allow_missing: bool = False,
) -> tuple[Any, BlockFiles]:
    """A model whose blocks are on the meta device, and the files that hold them.

    Args:
        model: a directory or a name on the hub, in safetensors.
        blocks: finds the modules that stay in the files.
        dtype, config, allow_missing: as for :func:`thanos.checkpoint.load_model`.

    Raises:
        ValueError: as :func:`thanos.checkpoint.load_model`, or the checkpoint is in another format.
    """
    if is_gguf(model) or not can_convert():
        why = "a GGUF file is unpacked as a whole" if is_gguf(model) else "this needs transformers 5"
        raise ValueError(f"{model} cannot be streamed: {why}; pass --stream no")
    from transformers import PreTrainedModel

    found: list[BlockFiles] = []

    def load(skeleton: Any, _: Any, files: list[str], loading: Any, *__: Any, **___: Any) -> tuple[Any, None]:
        if not all(file.endswith(".safetensors") for file in files):
            raise ValueError(
                f"{model} is not in safetensors, so it cannot be streamed; convert it once, where it fits into memory, "
                "by AutoModelForCausalLM.from_pretrained(MODEL, dtype='auto').save_pretrained(DIR), or pass --stream no"
            )
        found.append(BlockFiles(skeleton, [Path(file) for file in files], loading, blocks(skeleton)))
        return found[0].load_outside(), None

    with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
        loaded = load_model(model, dtype, config=config, allow_missing=allow_missing)
    return loaded, found[0]
