"""Weights in their compressed forms: which one a weight takes, its tensors, and the weight that they stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thanos.compact.base import SparseLinear
from thanos.compact.format import DTYPES, INT8, FormatError, Layer, base_of, expands_too_far
from thanos.compact.int8 import Int8BitmaskLinear, Int8Sparse24Linear
from thanos.compact.layers import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear, columns_removed, rows_not_24
from thanos_kernels.sparse import WORD
from thanos_kernels.sparse_int8 import GROUP

CLASSES: dict[str, type[SparseLinear]] = {
    "columns": ColumnPrunedLinear,
    "sparse24": Sparse24Linear,
    "bitmask": BitmaskLinear,
    "sparse24_int8": Int8Sparse24Linear,
    "bitmask_int8": Int8BitmaskLinear,
}
PARTS = ("values", "scales", "bits", "metadata", "columns", "outliers", "outlier_rows", "zero_signs")
_WORTH = 0.95  # of the dense bytes: a layer that saves less stays dense
_NEAR = 1.02  # of the smallest form: the faster of forms this near is taken


def choose(weight: Tensor, *, int8: bool = False) -> str:
    """The kind of layer for a weight (out_features, in_features): a key of ``CLASSES``, or "dense".

    The smallest form wins; among forms within 2% of it, the one that runs faster. A layer that would not save 5% stays
    dense, and with ``int8`` too, so that layers that were not pruned are not rounded.
    """
    bytes_of = _sizes(weight, weight.itemsize)
    best = min(bytes_of.values())
    if best > _WORTH * weight.nbytes:
        return "dense"
    if int8:
        rounded = {kind + INT8: size for kind, size in _sizes(weight, 1).items() if kind != "columns"}
        bytes_of = rounded | {kind: size for kind, size in bytes_of.items() if kind == "columns"}
        best = min(bytes_of.values())
    fit = [kind for kind in CLASSES if bytes_of.get(kind, 2 * weight.nbytes) <= _NEAR * best + 64]
    last = "bitmask" + INT8 if int8 else "bitmask"
    shape = (weight.shape[0], weight.shape[1])
    return next(kind for kind in [*fit, last] if not expands_too_far(shape, weight.itemsize, bytes_of[kind]))


def _sizes(weight: Tensor, size: int) -> dict[str, int]:
    """Bytes of each kind that the weight could take, its values of ``size`` bytes and, where that is one, scales."""
    rows, columns = weight.shape
    scales = 2 * -(-columns // GROUP) if size == 1 else 0  # of a row
    bytes_of = {}
    removed = columns_removed(weight)
    if bool(removed.any()):
        outliers = int((weight[:, removed] != 0).any(1).sum())
        kept = columns - int(removed.sum())
        bytes_of["columns"] = ((rows - outliers) * kept + outliers * columns) * size + 8 * (kept + outliers)
    if columns % 16 == 0:
        outliers = int(rows_not_24(weight).sum())
        if 2 * outliers <= rows:
            values = (rows - outliers) * (columns // 2 * size + columns // 8 + scales)
            bytes_of["sparse24"] = values + outliers * (columns * weight.itemsize + 8)
    bytes_of["bitmask"] = int(weight.count_nonzero()) * size + rows * (-(-columns // WORD) * 8 + scales)
    return bytes_of


def compress(
    weight: Tensor, tensor: str, file: str, transposed: bool, *, int8: bool = False
) -> tuple[Layer, dict[str, Tensor]] | None:
    """The layer and its tensors, or None where the weight stays dense.

    Raises:
        ValueError: with ``int8``, a weight is not finite, or too large for a float16 scale.
    """
    names = {dtype: name for name, (_, dtype) in DTYPES.items()}
    if weight.dtype not in names:
        return None
    matrix = weight.T.contiguous() if transposed else weight
    kind = choose(matrix, int8=int8)
    if kind == "dense":
        return None
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    try:
        sparse = CLASSES[kind].from_linear(linear)
    except ValueError as error:
        raise ValueError(f"{tensor}: {error}") from error
    parts = dict(sparse.state_dict())
    zeros = matrix == 0
    negative = zeros & torch.signbit(matrix)
    rounded = base_of(kind) != kind
    if bool(negative.any()) and not rounded:
        parts["zero_signs"] = torch.from_numpy(np.packbits(negative[zeros].numpy(), bitorder="little"))
    half = matrix.shape[1] // 2
    kept = {"bitmask": len(parts["values"]), "sparse24": half}.get(base_of(kind), parts["values"].shape[-1])
    layer = Layer(
        kind=kind,
        tensor=tensor,
        file=file,
        shape=(matrix.shape[0], matrix.shape[1]),
        dtype=names[weight.dtype],
        transposed=transposed,
        outlier_rows=len(parts.get("outlier_rows", ())),
        kept=kept,
        zero_signs=int(zeros.sum()) if "zero_signs" in parts else 0,
    )
    if rounded:
        return layer, parts
    restored = _with_signs(sparse.weight, parts.get("zero_signs"))
    return (layer, parts) if _same_bits(restored, matrix) else None


def restore(reader: Any, name: str, layer: Layer) -> Tensor:
    """The tensor of the ordinary checkpoint; of int8 values, what they were rounded to.

    Args:
        reader: of the compact file, as ``safe_open`` gives it.

    Raises:
        FormatError: (a ValueError) the tensors contradict each other.
    """
    rows, columns = layer.shape
    sparse = CLASSES[layer.kind](columns, rows, False, "meta", DTYPES[layer.dtype][1])
    parts = {tensor.removeprefix(f"{name}."): reader.get_tensor(tensor) for tensor in layer.tensors(name)}
    signs = parts.pop("zero_signs", None)
    try:
        sparse.load_state_dict(parts, assign=True)
        weight = _with_signs(sparse.weight, signs, layer.zero_signs)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"layer {name} is damaged: {' '.join(str(error).split())}") from error
    return weight.T.contiguous() if layer.transposed else weight


def _with_signs(weight: Tensor, signs: Tensor | None, count: int | None = None) -> Tensor:
    """Make negative the zeros whose bits are set, in row-major order, the low bits first."""
    bits = weight.view(torch.int16 if weight.itemsize == 2 else torch.int32)
    zeros = weight == 0
    bits.masked_fill_(zeros, 0)  # a filler of 2:4 may have been a negative zero
    if signs is None:
        return weight
    number = int(zeros.sum())
    if count is not None and count != number:
        raise ValueError(f"{count} signs are stored for {number} zeros")
    negative = np.unpackbits(signs.numpy(), count=number, bitorder="little").astype(bool)
    places = zeros.view(-1).nonzero()[:, 0][torch.from_numpy(negative)]
    bits.view(-1)[places] = torch.iinfo(bits.dtype).min
    return weight


def _same_bits(left: Tensor, right: Tensor) -> bool:
    kind = torch.int16 if left.itemsize == 2 else torch.int32
    return left.shape == right.shape and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))
