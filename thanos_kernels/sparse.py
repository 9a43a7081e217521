"""Products with compressed weights: C++ kernels on the CPU for few tokens, tiles decoded into cache for many.

A weight is one of three forms, all of shape (c, b):

* :class:`Bitmask`: a bit for each weight and the kept values. Bit j % 64 of word j // 64 of a row is set where column j
  is kept; unused bits are zero.
* :class:`Rows24`: 2:4, ``row_major`` (see :mod:`thanos_kernels.pack`) of a 16-bit or 32-bit float.
* :class:`Dense`: as it is.

:func:`linear` computes ``x @ weight.T + bias``. Sums are float32; bfloat16 results are rounded once. What no kernel
takes (float64, or a machine without the extension) is decoded by PyTorch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from thanos_kernels import native
from thanos_kernels.pack import Packed24, unpack_24, unpack_24_codes

WORD = 64
EXTENSION: Any = vars(native)["_C"]
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
_TILE_BYTES = 32 << 20  # of decoded weights: the library loses speed on smaller ones, larger ones leave the cache
_scratch = threading.local()  # the tile, kept between calls: fresh pages cost more than decoding into them
_POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)

# Up to how many tokens a kernel beats the library: on compressed weights, which the library needs decoded first, and on
# dense ones. Measured by benchmarks/test_sparse.py at 4096 x 11008 on two Zen 4 cores.
FEW_TOKENS = {torch.bfloat16: 16, torch.float32: 48}
FEW_TOKENS_DENSE = {torch.bfloat16: 2, torch.float32: 16}


@dataclass(frozen=True)
class Bitmask:
    """``values`` (kept,), ``bits`` (c, ceil(b/64)) int64, ``starts`` (c + 1,) int64: where each row's values begin."""

    values: Tensor
    bits: Tensor
    starts: Tensor
    shape: tuple[int, int]

    def decode(self, first: int = 0, count: int | None = None, out: Tensor | None = None) -> Tensor:
        """Rows ``first`` to ``first + count`` as they were, zeros positive; in ``out`` (count, b) where given."""
        count = self.shape[0] - first if count is None else count
        out = self.values.new_empty((count, self.shape[1])) if out is None else out
        if _native(self.values):
            arguments = (self.values.data_ptr(), self.bits.data_ptr(), self.starts.data_ptr())
            EXTENSION.bitmask_decode(*arguments, *self.shape, first, count, *_output(out))
            return out
        shifts = torch.arange(WORD, dtype=torch.int64, device=self.bits.device)
        kept = (self.bits[first : first + count, :, None] >> shifts & 1).flatten(1)[:, : self.shape[1]].bool()
        start, end = int(self.starts[first]), int(self.starts[first + count])
        return out.zero_().masked_scatter_(kept, self.values[start:end])

    def _kernel(self, inputs: int, bias: int, targets: int, out: Tensor, tokens: int) -> None:
        arguments = (self.values.data_ptr(), self.bits.data_ptr(), self.starts.data_ptr(), inputs, bias, targets)
        EXTENSION.bitmask_linear(*arguments, out.data_ptr(), *self.shape, tokens, out.shape[1], *_machine(out))


@dataclass(frozen=True)
class Rows24:
    """``values`` (c, b/2) and ``metadata`` (c, b/16) int16, contiguous."""

    values: Tensor
    metadata: Tensor
    shape: tuple[int, int]

    def decode(self, first: int = 0, count: int | None = None, out: Tensor | None = None) -> Tensor:
        """Rows ``first`` to ``first + count`` as they were; in ``out`` (count, b) where given, on the CPU."""
        count = self.shape[0] - first if count is None else count
        if _native(self.values):
            out = self.values.new_empty((count, self.shape[1])) if out is None else out
            arguments = (self.values.data_ptr(), self.metadata.data_ptr())
            EXTENSION.sparse24_decode(*arguments, *self.shape, first, count, *_output(out))
            return out
        values, metadata = self.values[first : first + count], self.metadata[first : first + count]
        if values.dtype in _KINDS:
            return unpack_24(Packed24(values, metadata, "row_major", (count, self.shape[1])))
        positions = unpack_24_codes(metadata)
        groups = values.new_zeros((*positions.shape[:2], 4))
        return groups.scatter_(2, positions, values.unflatten(1, (-1, 2))).flatten(1)

    def _kernel(self, inputs: int, bias: int, targets: int, out: Tensor, tokens: int) -> None:
        arguments = (self.values.data_ptr(), self.metadata.data_ptr(), inputs, bias, targets)
        EXTENSION.sparse24_linear(*arguments, out.data_ptr(), *self.shape, tokens, out.shape[1], *_machine(out))


@dataclass(frozen=True)
class Dense:
    """``values`` (c, b), contiguous."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def decode(self, first: int = 0, count: int | None = None, out: Tensor | None = None) -> Tensor:
        return self.values[first : None if count is None else first + count]

    def _kernel(self, inputs: int, bias: int, targets: int, out: Tensor, tokens: int) -> None:
        arguments = (self.values.data_ptr(), inputs, bias, targets, out.data_ptr())
        EXTENSION.dense_linear(*arguments, *self.shape, tokens, out.shape[1], *_machine(out))


class Weight(Protocol):
    """A form of weight: those above, and :class:`thanos_kernels.sparse_int8.Int8`."""

    @property
    def values(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def decode(self, first: int = 0, count: int | None = None, out: Tensor | None = None) -> Tensor: ...

    def _kernel(self, inputs: int, bias: int, targets: int, out: Tensor, tokens: int) -> None: ...


@dataclass(frozen=True)
class Outliers:
    """Rows kept dense beside a weight that holds the others.

    Attributes:
        weight: (k, b), the rows.
        rows: (k,) int64, their places among all c rows; ``others`` (c - k,) int64, those of the other rows.
        order: (c,) int64, where each row stands among the others followed by these.
    """

    weight: Tensor
    rows: Tensor
    others: Tensor
    order: Tensor


def linear(
    inputs: Tensor,
    weight: Weight,
    bias: Tensor | None,
    outliers: Outliers | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """``inputs @ W.T + bias`` (tokens, c) on the CPU: by a kernel for few tokens, by decoded tiles for many.

    Args:
        inputs: (tokens, b), contiguous, in the dtype of the weight.
        weight: W, or the rows of it that are no outliers.
        bias: (c,), the same dtype.
        columns: (kept,) int64: the columns of the inputs that ``weight`` multiplies; None means all.

    Raises:
        TypeError: not everything is of the inputs' dtype. Kernels read memory and would not notice.
    """
    for tensor in (weight.values, bias, None if outliers is None else outliers.weight):
        if tensor is not None and tensor.dtype not in (inputs.dtype, torch.int8):
            raise TypeError(
                f"inputs are {inputs.dtype}, but a part of the layer is {tensor.dtype}: convert it with .to()"
            )
    bias = None if bias is None else bias.contiguous()
    if outliers is not None and len(outliers.rows) == 0:
        outliers = None
    rows = weight.shape[0] if outliers is None else len(outliers.order)
    kept = inputs if columns is None else gather_columns(inputs, columns)
    out = inputs.new_empty((len(inputs), rows))
    if few(inputs, dense=columns is not None):
        multiply_few(kept, weight, bias, out, None if outliers is None else outliers.others)
        if outliers is not None:
            multiply_few(inputs, Dense(outliers.weight), bias, out, outliers.rows)
        return out
    if outliers is None:
        multiply_many(kept, weight, bias, out)
        return out
    count = len(outliers.others)
    parts = (None, None) if bias is None else (bias[outliers.others], bias[outliers.rows])
    multiply_many(kept, weight, parts[0], out[:, :count])
    multiply_many(inputs, Dense(outliers.weight), parts[1], out[:, count:])
    return out.index_select(1, outliers.order)


def few(inputs: Tensor, *, dense: bool = False) -> bool:
    """Whether ``inputs`` (tokens, b) are few enough for the kernels, of a kind they take, and on the CPU."""
    limits = FEW_TOKENS_DENSE if dense else FEW_TOKENS
    return inputs.shape[0] <= limits.get(inputs.dtype, 0) and _native(inputs)


def multiply_few(inputs: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, targets: Tensor | None) -> None:
    """``out[:, targets] = inputs @ weight.T + bias[targets]`` by a kernel that reads the weights once.

    Args:
        inputs: (tokens, b), float32 or bfloat16 as the weight, contiguous, on the CPU.
        bias: (outputs,), the same dtype.
        out: (tokens, outputs), the same dtype, contiguous; only the columns in ``targets`` are written.
        targets: (c,) int64, each row's column of ``out``; None means row i is column i.
    """
    bias_address = 0 if bias is None else bias.data_ptr()
    target_address = 0 if targets is None else targets.data_ptr()
    weight._kernel(inputs.data_ptr(), bias_address, target_address, out, inputs.shape[0])


def multiply_many(inputs: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """``out = inputs @ weight.T + bias``, the weight decoded a tile of rows at a time for the library product.

    ``out`` (tokens, c) may be a slice of wider rows.
    """
    rows, columns = weight.shape
    tile, scratch = rows, None
    if not isinstance(weight, Dense):
        tile = min(rows, max(64, _TILE_BYTES // max(1, columns * inputs.itemsize)))
        scratch = _tile(tile, columns, inputs)
    for first in range(0, rows, tile):
        count = min(tile, rows - first)
        part = slice(first, first + count)
        decoded = weight.decode(first, count, None if scratch is None else scratch[:count])
        if count == 1:  # PyTorch 2.8 computes a strided output of one bfloat16 column wrongly
            out[:, part] = torch.nn.functional.linear(inputs, decoded, None if bias is None else bias[part])
        elif bias is None:
            torch.mm(inputs, decoded.T, out=out[:, part])
        else:
            torch.addmm(bias[part], inputs, decoded.T, out=out[:, part])


def _tile(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for a decoded tile: this thread's own up to ``_TILE_BYTES``, else new."""
    size = rows * columns * like.itemsize
    if like.device.type != "cpu" or size > _TILE_BYTES:
        return like.new_empty((rows, columns))
    held: Tensor | None = getattr(_scratch, "memory", None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # so that it serves in and out of inference mode
            held = _scratch.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    return held[:size].view(like.dtype).view(rows, columns)


def gather_columns(inputs: Tensor, columns: Tensor) -> Tensor:
    """``inputs[:, columns]`` for inputs (tokens, b), contiguous, and columns (kept,) int64, all from 0 to below b."""
    if not _native(inputs):
        return inputs.index_select(1, columns)
    out = inputs.new_empty((len(inputs), len(columns)))
    arguments = (inputs.data_ptr(), columns.data_ptr(), out.data_ptr())
    EXTENSION.gather_columns(*arguments, *inputs.shape, len(columns), *_machine(out))
    return out


def bitmask_of(weight: Tensor) -> Bitmask:
    """A weight (c, b) of any float dtype with its nonzero values kept."""
    kept = (weight != 0).cpu()
    packed = np.packbits(kept.numpy(), axis=1, bitorder="little")
    words = -(-weight.shape[1] // WORD)
    padded = np.zeros((weight.shape[0], 8 * words), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    bits = torch.from_numpy(padded.view(np.int64)).to(weight.device)
    shape = (weight.shape[0], weight.shape[1])
    return Bitmask(weight.masked_select(kept.to(weight.device)), bits, starts_of(bits), shape)


def starts_of(bits: Tensor) -> Tensor:
    """Where each row's values begin, and how many there are: (c + 1,) int64 from ``bits`` (c, words) int64."""
    counts = _POPCOUNT[bits.cpu().contiguous().numpy().view(np.uint8)].sum(1, dtype=np.int64)
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return torch.from_numpy(starts).to(bits.device)


def _native(tensor: Tensor) -> bool:
    """Whether the kernels take a tensor of values or activations; the decoders move 16 bits whatever they mean."""
    return tensor.dtype in _KINDS and native.ready(tensor)


def _machine(tensor: Tensor) -> tuple[int, int]:
    return tensor.itemsize, torch.get_num_threads()


def _output(out: Tensor) -> tuple[int, int, int]:
    return (out.data_ptr(), *_machine(out))
