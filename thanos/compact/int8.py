"""Sparse layers whose kept values are int8, with a float16 scale for each 128 columns of a row.

Half the bytes of the layers they derive from. Made of them by ``from_sparse``; outlier rows stay as they are. A layer
keeps the dtype of the activations that it takes and gives, which ``.to(dtype)`` changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from thanos.compact.base import SparseLinear
from thanos.compact.layers import BitmaskLinear, Sparse24Linear
from thanos_kernels import sparse_library as library
from thanos_kernels.sparse import Bitmask, Rows24
from thanos_kernels.sparse_int8 import GROUP, LARGEST, Int8, as_int8


class _Int8Linear(SparseLinear):
    """What both share. ``scales`` (rows, groups) int16 hold the bits of float16, so that no ``.to`` rounds them."""

    _typed = "like"
    scales: Tensor
    like: Tensor

    def _add_scales(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        groups = -(-self.in_features // GROUP)
        ones = torch.ones(self.out_features, groups, device=device, dtype=torch.float16)
        self.register_buffer("scales", ones.view(torch.int16))
        self.values: Tensor = self.get_buffer("values").to(torch.int8)
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @classmethod
    def from_sparse(cls, layer: SparseLinear) -> Self:
        """The layer with the values of a ``BitmaskLinear`` or a ``Sparse24Linear`` rounded to int8.

        Raises:
            TypeError: the layer is not of the class that this one derives from.
            ValueError: a weight is not finite, or too large for a float16 scale.
        """
        base = cls.__mro__[2]
        if type(layer) is not base:
            raise TypeError(f"{cls.__name__}.from_sparse takes a {base.__name__}, not a {type(layer).__name__}")
        new = cls(
            layer.in_features, layer.out_features, layer.bias is not None, layer._form.values.device, layer._dtype
        )
        packed = as_int8(layer._form.decode(), layer._form)
        for name, buffer in layer.named_buffers():
            setattr(new, name, buffer)
        new.values, new.scales = packed.values, packed.scales.view(torch.int16)
        new._derive()
        return new.train(layer.training)

    @property
    def _form(self) -> Any:
        raise NotImplementedError

    @property
    def _int8(self) -> Int8:
        return Int8(self._form, self.scales.view(torch.float16), self._dtype)

    def _check_scales(self, rows: int) -> None:
        groups = -(-self.in_features // GROUP)
        if self.values.dtype != torch.int8 or self.scales.shape != (rows, groups):
            raise ValueError(
                f"scales of shape {tuple(self.scales.shape)} do not fit {rows} rows of {groups} groups of int8 values"
            )
        self.scales = self.scales.contiguous()
        if self.scales.is_meta:
            return
        scales = self.scales.view(torch.float16)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise ValueError("scales must be positive and finite")
        if len(self.values) and bool((self.values < -LARGEST).any()):
            raise ValueError(f"values must be from -{LARGEST} to {LARGEST}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scales"] = self.scales.view(torch.float16)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        loaded = state_dict.get(prefix + "scales")
        if isinstance(loaded, Tensor) and loaded.dtype == torch.float16:
            state_dict = {**state_dict, prefix + "scales": loaded.contiguous().view(torch.int16)}
        super()._load_from_state_dict(state_dict, prefix, *others)
        if self.bias is not None and self.bias.dtype != self.like.dtype and not self.bias.is_meta:
            self.like = self.like.to(self.bias.dtype)
        if self.like.is_meta and not self.values.is_meta:
            self.like = torch.empty(0, device=self.values.device, dtype=self.like.dtype)


class Int8BitmaskLinear(_Int8Linear, BitmaskLinear):
    """Any pattern. Buffers: ``values`` (kept,) int8, ``bits`` as of a ``BitmaskLinear``, ``scales``; ``bias``."""

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super()._make_buffers(device, dtype)
        self._add_scales(device, dtype)

    def _compress(self, weight: Tensor) -> None:
        super()._compress(weight)
        packed = as_int8(weight, self._form)
        self.values, self.scales = packed.values, packed.scales.view(torch.int16)

    def _derive(self) -> None:
        super()._derive()
        self._check_scales(self.out_features)

    @property
    def _form(self) -> Bitmask:
        return Bitmask(self.values, self.bits, self.starts, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        return self._int8.decode()

    def _product(self, inputs: Tensor) -> Tensor:
        held = self._buffers
        parts = (held["values"], self.scales.view(torch.float16), held["bits"], held["starts"])
        return library.int8_bitmask_linear(inputs, *parts, held["bias"])


class Int8Sparse24Linear(_Int8Linear, Sparse24Linear):
    """2:4, outlier rows as they are. Buffers: those of a ``Sparse24Linear``, ``values`` int8, and ``scales``."""

    _sized = ("values", "metadata", "scales", "outliers", "outlier_rows")

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super()._make_buffers(device, dtype)
        self._add_scales(device, dtype)

    def _compress(self, weight: Tensor) -> None:
        super()._compress(weight)
        packed = as_int8(self._form.decode(), self._form)
        self.values, self.scales = packed.values, packed.scales.view(torch.int16)

    def _derive(self) -> None:
        super()._derive()
        self._check_scales(len(self.values))

    @property
    def _form(self) -> Rows24:
        return Rows24(self.values, self.metadata, (len(self.values), self.in_features))

    def _decoded_rows(self) -> Tensor:
        return self._int8.decode()

    def _product(self, inputs: Tensor) -> Tensor:
        held = self._buffers
        parts = (held["values"], self.scales.view(torch.float16), held["metadata"], *self._places)
        return library.int8_sparse24_linear(inputs, *parts, held["bias"])

    def _accelerated(self, inputs: Tensor) -> Tensor:
        return SparseLinear._accelerated(self, inputs)
