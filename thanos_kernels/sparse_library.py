"""The products with compressed weights as ``torch.library`` operators, ``torch.ops.thanos.*``, for the compiler.

One operator a form of weight: how many tokens there are, which decides how they are multiplied, is looked at inside, so
that one compiled graph serves every length. Arguments are as :func:`thanos_kernels.sparse.linear` takes them. An
operator costs some microseconds a call, so ordinary tensors outside the compiler go without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thanos_kernels.sparse import Bitmask, Dense, Outliers, Rows24, linear
from thanos_kernels.sparse_int8 import Int8

_LIBRARY = torch.library.Library("thanos", "FRAGMENT")
_OUTLIERS = "Tensor outliers, Tensor outlier_rows, Tensor rows, Tensor order"
_SCHEMAS = (
    "bitmask_linear(Tensor inputs, Tensor values, Tensor bits, Tensor starts, Tensor? bias) -> Tensor",
    f"sparse24_linear(Tensor inputs, Tensor values, Tensor metadata, {_OUTLIERS}, Tensor? bias) -> Tensor",
    "int8_bitmask_linear(Tensor inputs, Tensor values, Tensor scales, Tensor bits, Tensor starts, Tensor? bias) "
    "-> Tensor",
    f"int8_sparse24_linear(Tensor inputs, Tensor values, Tensor scales, Tensor metadata, {_OUTLIERS}, Tensor? bias) "
    "-> Tensor",
    f"columns_linear(Tensor inputs, Tensor values, Tensor columns, {_OUTLIERS}, Tensor? bias) -> Tensor",
)


def _bitmask_linear(inputs: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return linear(inputs, Bitmask(values, bits, starts, (len(bits), inputs.shape[1])), bias)


def _sparse24_linear(
    inputs: Tensor,
    values: Tensor,
    metadata: Tensor,
    outliers: Tensor,
    outlier_rows: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    weight = Rows24(values, metadata, (len(values), inputs.shape[1]))
    return linear(inputs, weight, bias, Outliers(outliers, outlier_rows, rows, order))


def _int8_bitmask_linear(
    inputs: Tensor, values: Tensor, scales: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    form = Bitmask(values, bits, starts, (len(bits), inputs.shape[1]))
    return linear(inputs, Int8(form, scales, inputs.dtype), bias)


def _int8_sparse24_linear(
    inputs: Tensor,
    values: Tensor,
    scales: Tensor,
    metadata: Tensor,
    outliers: Tensor,
    outlier_rows: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    form = Rows24(values, metadata, (len(values), inputs.shape[1]))
    weight = Int8(form, scales, inputs.dtype)
    return linear(inputs, weight, bias, Outliers(outliers, outlier_rows, rows, order))


def _fake_int8_bitmask_linear(
    inputs: Tensor, values: Tensor, scales: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:
    return inputs.new_empty((inputs.shape[0], bits.shape[0]))


def _fake_int8_sparse24_linear(inputs: Tensor, *parts: Tensor | None) -> Tensor:
    order = parts[6]
    assert order is not None
    return inputs.new_empty((inputs.shape[0], order.shape[0]))


def _columns_linear(
    inputs: Tensor,
    values: Tensor,
    columns: Tensor,
    outliers: Tensor,
    outlier_rows: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return linear(inputs, Dense(values), bias, Outliers(outliers, outlier_rows, rows, order), columns)


def _fake_bitmask_linear(inputs: Tensor, values: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty((inputs.shape[0], bits.shape[0]))


def _fake_with_outliers(
    inputs: Tensor,
    values: Tensor,
    metadata: Tensor,
    outliers: Tensor,
    outlier_rows: Tensor,
    rows: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return inputs.new_empty((inputs.shape[0], order.shape[0]))


def _define(schema: str, real: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register an operator; returns what calls it, or ``real`` by itself where nobody traces."""
    name = _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"thanos::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.thanos, name).default

    def call(inputs: Tensor, *others: Any) -> Tensor:
        traced = type(inputs) is not Tensor or inputs.is_meta or torch.compiler.is_compiling()
        return (operator if traced else real)(inputs, *others)

    return call


bitmask_linear = _define(_SCHEMAS[0], _bitmask_linear, _fake_bitmask_linear)
sparse24_linear = _define(_SCHEMAS[1], _sparse24_linear, _fake_with_outliers)
int8_bitmask_linear = _define(_SCHEMAS[2], _int8_bitmask_linear, _fake_int8_bitmask_linear)
int8_sparse24_linear = _define(_SCHEMAS[3], _int8_sparse24_linear, _fake_int8_sparse24_linear)
columns_linear = _define(_SCHEMAS[4], _columns_linear, _fake_with_outliers)
