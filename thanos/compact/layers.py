"""Linear layers that keep their pruned weights compressed: drop-ins for ``nn.Linear`` at inference.

Each is made by ``from_linear`` and has the shapes, the bias, the dtypes (float32, bfloat16, float16) and the result of
the layer it stands for. Few tokens, as in decoding, are multiplied by kernels that read the compressed weights once;
for many the weights are decoded a tile at a time for PyTorch's product. There is no backward.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear as dense_product

from thanos.compact.base import OutlierRowsLinear, SparseLinear, check_index
from thanos_kernels import Packed24, pack_24
from thanos_kernels import sparse_library as library
from thanos_kernels.pack import reorder
from thanos_kernels.sparse import (
    WORD,
    Bitmask,
    Dense,
    Rows24,
    bitmask_of,
    starts_of,
)

_GROUP_CODES = (4, 8, 12, 9, 13, 14)  # of two columns in order
_CODES = np.array([byte & 15 in _GROUP_CODES and byte >> 4 in _GROUP_CODES for byte in range(256)])  # of two groups
_EMPTY_CODES = -4370  # int16 0xEEEE: four groups that keep their last two positions


class BitmaskLinear(SparseLinear):
    """Any pattern: a bit for each weight and the kept values.

    Buffers: ``values`` (kept,), row by row; ``bits`` (out_features, ceil(in_features / 64)) int64, bit j % 64 of word
    j // 64 set where column j is kept; ``bias``.
    """

    _sized = ("values",)
    values: Tensor
    bits: Tensor
    starts: Tensor

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        words = -(-self.in_features // WORD)
        self.register_buffer("values", torch.empty(0, device=device, dtype=dtype))
        self.register_buffer("bits", torch.zeros(self.out_features, words, device=device, dtype=torch.int64))
        starts = torch.zeros(self.out_features + 1, device=device, dtype=torch.int64)
        self.register_buffer("starts", starts, persistent=False)

    def _compress(self, weight: Tensor) -> None:
        packed = bitmask_of(weight)
        self.values, self.bits, self.starts = packed.values, packed.bits, packed.starts

    def _derive(self) -> None:
        self.values, self.bits = self.values.contiguous(), self.bits.contiguous()
        if self.bits.is_meta:
            return
        self.starts = starts_of(self.bits)
        if int(self.starts[-1]) != len(self.values):
            raise ValueError(f"bits keep {int(self.starts[-1])} weights, but there are {len(self.values)} values")
        spare = self.in_features % WORD
        if spare and bool((self.bits[:, -1] >> spare & ((1 << WORD - spare) - 1)).any()):
            raise ValueError(f"bits beyond column {self.in_features - 1} are set")

    @property
    def _form(self) -> Bitmask:
        return Bitmask(self.values, self.bits, self.starts, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        return self._form.decode()

    def _product(self, inputs: Tensor) -> Tensor:
        held = self._buffers  # attributes of a module take longer to find
        return library.bitmask_linear(inputs, held["values"], held["bits"], held["starts"], held["bias"])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={len(self.values)}"


class Sparse24Linear(OutlierRowsLinear):
    """2:4, with outlier rows kept as a small dense matrix. ``in_features`` must be a multiple of 16.

    Buffers: ``values`` (rows, in_features / 2), ``metadata`` (rows, in_features / 16) int16 in the ``row_major`` layout
    of :mod:`thanos_kernels.pack`; ``outliers``, ``outlier_rows``; ``bias``.
    """

    _sized: tuple[str, ...] = ("values", "metadata", "outliers", "outlier_rows")
    values: Tensor
    metadata: Tensor

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super()._make_buffers(device, dtype)
        rows, columns = self.out_features, self.in_features
        if columns % 16:
            raise ValueError(f"Sparse24Linear needs in_features to be a multiple of 16, not {columns}")
        self.register_buffer("values", torch.zeros(rows, columns // 2, device=device, dtype=dtype))
        codes = torch.full((rows, columns // 16), _EMPTY_CODES, device=device, dtype=torch.int16)
        self.register_buffer("metadata", codes)

    def _compress(self, weight: Tensor) -> None:
        outlier = rows_not_24(weight)
        if 2 * int(outlier.sum()) > len(weight):
            raise ValueError(
                f"the weight is not 2:4: {int(outlier.sum())} of its {len(weight)} rows keep more than two of some "
                f"four columns, row {int(outlier.to(torch.uint8).argmax())} the first; use BitmaskLinear"
            )
        packed = pack_24(self._split(weight, outlier))
        self.values, self.metadata = packed.values, packed.metadata

    def _derive(self) -> None:
        super()._derive()
        self.values, self.metadata = self.values.contiguous(), self.metadata.contiguous()
        shapes = (self.in_features // 2, self.in_features // 16, len(self.values))
        if (self.values.shape[1], self.metadata.shape[1], len(self.metadata)) != shapes:
            raise ValueError(
                f"values {tuple(self.values.shape)} and metadata {tuple(self.metadata.shape)} are not those of 2:4 "
                f"rows of {self.in_features} columns"
            )
        if not self.metadata.is_meta and not _CODES[self.metadata.cpu().numpy().view(np.uint8)].all():
            raise ValueError("metadata holds a code of a 2:4 group that does not name two columns in order")

    @property
    def _form(self) -> Rows24:
        return Rows24(self.values, self.metadata, (len(self.values), self.in_features))

    def _product(self, inputs: Tensor) -> Tensor:
        held = self._buffers
        return library.sparse24_linear(inputs, held["values"], held["metadata"], *self._places, held["bias"])

    def _accelerated(self, inputs: Tensor) -> Tensor:
        if self._on_device is None or self._on_device.device != inputs.device:
            self._on_device = _semi_structured(self._form) if inputs.is_cuda else None
            if self._on_device is None:
                self._on_device = self._decoded_rows()
        count = len(self.rows)
        out = inputs.new_empty((len(inputs), self.out_features))
        out[:, self.rows] = dense_product(inputs, self._on_device)[:, :count]
        out[:, self.outlier_rows] = dense_product(inputs, self.outliers)
        return out if self.bias is None else out.add_(self.bias)


class ColumnPrunedLinear(OutlierRowsLinear):
    """Structured: the kept columns of the pruned rows as one dense matrix, the outlier rows as another.

    Buffers: ``values`` (rows, kept) and ``columns`` (kept,) int64, strictly increasing; ``outliers``,
    ``outlier_rows``; ``bias``.
    """

    _sized = ("values", "columns", "outliers", "outlier_rows")
    values: Tensor
    columns: Tensor

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        super()._make_buffers(device, dtype)
        self.register_buffer("values", torch.empty(self.out_features, 0, device=device, dtype=dtype))
        self.register_buffer("columns", torch.empty(0, device=device, dtype=torch.int64))

    def _compress(self, weight: Tensor) -> None:
        removed = columns_removed(weight)
        outlier = (weight[:, removed] != 0).any(1)
        self.columns = (~removed).nonzero()[:, 0]
        self.values = self._split(weight, outlier)[:, self.columns].contiguous()

    def _derive(self) -> None:
        super()._derive()
        self.values, self.columns = self.values.contiguous(), self.columns.contiguous()
        if self.values.shape[1] != len(self.columns):
            raise ValueError(f"values have {self.values.shape[1]} columns, but {len(self.columns)} are named")
        if not self.columns.is_meta:
            check_index("columns", self.columns, self.in_features)

    @property
    def _form(self) -> Dense:
        return Dense(self.values)

    def _product(self, inputs: Tensor) -> Tensor:
        held = self._buffers
        return library.columns_linear(inputs, held["values"], held["columns"], *self._places, held["bias"])

    def _decoded_rows(self) -> Tensor:
        decoded = self.values.new_zeros((len(self.values), self.in_features))
        return decoded.index_copy_(1, self.columns, self.values)

    def _accelerated(self, inputs: Tensor) -> Tensor:
        return self._product(inputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, columns={len(self.columns)}"


def _semi_structured(weight: Rows24) -> Tensor | None:
    """PyTorch's 2:4 tensor around our values (its metadata reordered); None, with a warning, where it does not work."""
    rows, columns = weight.shape
    if weight.values.dtype not in (torch.float16, torch.bfloat16) or rows % 32 or columns % 64:
        return None
    try:
        from torch.sparse import SparseSemiStructuredTensorCUTLASS

        packed = reorder(Packed24(weight.values, weight.metadata, "row_major", weight.shape), "cutlass")
        candidate: Tensor = SparseSemiStructuredTensorCUTLASS(
            torch.Size(weight.shape), packed.values, packed.metadata, None, None, None
        )
        draw = torch.Generator("cpu").manual_seed(0)  # the caller's stays as it is
        probe = torch.randn(64, columns, generator=draw, device="cpu", dtype=torch.float32).to(weight.values)
        torch.testing.assert_close(
            dense_product(probe, candidate), dense_product(probe, weight.decode()), rtol=2e-2, atol=2e-2
        )
    except (RuntimeError, NotImplementedError, TypeError, AssertionError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"2:4 tensor cores are not used, the weight is decoded instead: {reason}", stacklevel=2)
        return None
    return candidate


def rows_not_24(weight: Tensor) -> Tensor:
    """Mask (c,) of the rows of which some four columns keep more than two values; 4 divides the columns."""
    kept = (weight != 0).unflatten(1, (-1, 4)).sum(2, dtype=torch.uint8)
    return (kept > 2).any(1)


def columns_removed(weight: Tensor) -> Tensor:
    """Mask (b,) of the columns that are zero in at least half of the rows."""
    return 2 * (weight == 0).sum(0) >= len(weight)
