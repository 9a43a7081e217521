"""What lets ``from_pretrained`` of Transformers read compact checkpoints: a quantizer, as Transformers calls that.

Transformers reads the dense tensors. While it does, empty modules that take part in nothing stand where the sparse
layers go, which are read here, by the same code as in :func:`thanos.compact.load`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from thanos.compact.base import SparseLinear
from thanos.compact.files import METHOD
from thanos.compact.format import FORMAT, MANIFEST, FormatError, Manifest, read_manifest
from thanos.compact.placing import Placed, finish, place, read_sparse, shapes_of
from thanos.compact.structure import check_depth, describe


@register_quantization_config(METHOD)
class CompactConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compact checkpoint: names the format; the manifest says the rest."""

    def __init__(self, format: str = FORMAT, **others: Any) -> None:
        if format != FORMAT:
            raise FormatError(f"config.json names the format {format!r} of compact checkpoints; known is {FORMAT!r}")
        self.quant_method: Any = METHOD
        self.format = format


class Waiting(nn.Module):
    """Stands where a sparse layer goes while other tensors are read, and holds none.

    A model's own code for new weights looks at ``weight`` and ``bias``; whatever it writes there is nowhere.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.held = (layer,)  # in a tuple it is no part of the model
        self.bias: torch.Tensor | None = None
        if isinstance(layer, SparseLinear):
            self.weight = torch.empty(layer.out_features, layer.in_features, device="meta", dtype=torch.float32)
            if layer.bias is not None:
                self.bias = torch.empty(layer.out_features, device="meta", dtype=torch.float32)


@register_quantizer(METHOD)
class CompactQuantizer(HfQuantizer):
    """Puts sparse layers into a model that Transformers builds, and reads them."""

    requires_calibration = True  # layers are packed by thanos.pack, not while a model is read

    def __init__(self, quantization_config: QuantizationConfigMixin, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        self._found: tuple[Path, Manifest, dict[str, tuple[int, ...]]] | None = None
        self._placed: Placed | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """In Transformers 5, what sees the configuration before a model is built of it."""
        return self._examine(config)

    def update_tp_plan(self, config: Any) -> Any:
        """In Transformers 4.57, the same."""
        return self._examine(config)

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], *_: Any) -> list[str]:
        """In Transformers 4.56, which of the checkpoint's tensors have no place: none, they were compared."""
        return []

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse devices on which sparse layers do not run."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise ValueError("the layers of a compact checkpoint cannot be left on disk; take disk out of device_map")
        return device_map

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True  # save_pretrained of the model is files.save_again

    @property
    def is_trainable(self) -> bool:
        return False

    def _examine(self, config: Any) -> Any:
        """Compare the checkpoint with its configuration, if the configuration says already where it is."""
        if self._found is None and getattr(config, "name_or_path", None):
            folder = _folder(config)
            manifest = read_manifest(folder)
            shapes = shapes_of(manifest)
            check_depth(config, folder, shapes)
            self._found = folder, manifest, shapes
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self._examine(model.config)
        if self._found is None:
            raise FormatError("it is not known where the compact checkpoint is; give from_pretrained its directory")
        folder, manifest, shapes = self._found
        structure = describe(_twin(model), model.config, folder, shapes)
        self._placed = place(model, folder, manifest, structure, model.dtype)
        if self._placed.decoded:
            raise FormatError(
                f"{min(self._placed.decoded)} is no linear layer in this version of Transformers: load {folder} with "
                "thanos.load, which decodes it"
            )
        for name in self._placed.modules:
            model.set_submodule(name, Waiting(model.get_submodule(name)))
        # All tensors are known: they were compared with the model. In Transformers 4 these patterns are a list.
        kind = set if isinstance(model._keys_to_ignore_on_load_unexpected, set) else list
        model._keys_to_ignore_on_load_unexpected = kind([".*"])

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        assert self._placed is not None
        placed, self._placed = self._placed, None
        for name in placed.modules:
            model.set_submodule(name, model.get_submodule(name).held[0])
        read_sparse(model, placed)
        for name in placed.modules:
            model.get_submodule(name).to(_device(model, name))
        finish(model, placed)
        return model


def _twin(model: Any) -> Any:
    """A model of the same class without memory, its tied weights one. Within ``from_pretrained`` none are tied."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    if not hasattr(twin, "get_expanded_tied_weights_keys"):  # in Transformers 4
        twin.tie_weights()
        return twin
    for target, source in twin.get_expanded_tied_weights_keys(all_submodels=True).items():
        module, _, own = target.rpartition(".")
        setattr(twin.get_submodule(module), own, twin.get_parameter(source))
    return twin


def _folder(config: Any) -> Path:
    """Where the manifest is: the directory of the model, or where a model of the hub is kept."""
    from transformers.utils.hub import cached_file

    name = config.name_or_path
    if Path(name).is_dir():
        return Path(name)
    found = cached_file(name, MANIFEST, _commit_hash=getattr(config, "_commit_hash", None))
    return Path(str(found)).parent


def _device(model: Any, name: str) -> torch.device:
    """Where a layer belongs: where the map of devices says, or where the model is."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    prefixes = [prefix for prefix in places if not prefix or f"{name}.".startswith(f"{prefix}.")]
    if prefixes:
        return torch.device(places[max(prefixes, key=len)])
    return next(model.parameters()).device
