"""Compressed weights whose kept values are int8, with a float16 scale for each 128 columns of a row.

At 50% that is a scale for 64 kept values: of 2:4 exactly, of an unstructured mask on average. Groups are of columns and
not of kept values so that a product with activations, which are grouped by columns, needs one multiplication a group.
:class:`Int8` is a form of weight as those of :mod:`thanos_kernels.sparse`; few tokens become int8 as well, a
scale for a quarter of such a group, and are multiplied in whole numbers; for many the weight is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thanos_kernels import native, sparse
from thanos_kernels.pack import unpack_24_codes

TOO_LARGE = "a weight is not finite, or too large for int8 values with a float16 scale"
GROUP = 128  # columns of a row that share a scale
LARGEST = 127


@dataclass(frozen=True)
class Int8:
    """A weight (c, b): ``form`` holds int8 values, ``scales`` (c, ceil(b/128)) are float16.

    ``dtype`` is what it is decoded to, and that of the activations.
    """

    form: sparse.Bitmask | sparse.Rows24
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape

    @property
    def values(self) -> Tensor:
        return self.form.values

    def decode(self, first: int = 0, count: int | None = None, out: Tensor | None = None) -> Tensor:
        """Rows ``first`` to ``first + count`` in ``dtype``; in ``out`` (count, b) where given."""
        count = self.shape[0] - first if count is None else count
        if self.dtype in (torch.float32, torch.bfloat16) and native.ready(self.values):
            if out is None:
                out = torch.empty((count, self.shape[1]), dtype=self.dtype, device=self.values.device)
            place = (out.data_ptr(), out.itemsize, torch.get_num_threads())
            sparse.EXTENSION.int8_decode(*self._addresses(), *self.shape, first, count, *place)
            return out
        whole = self.form.decode(first, count).float()
        scales = self.scales[first : first + count].float().repeat_interleave(GROUP, 1)[:, : self.shape[1]]
        decoded = (whole * scales).to(self.dtype)
        return decoded if out is None else out.copy_(decoded)

    def _addresses(self) -> tuple[int, ...]:
        """Of values, bits, starts, metadata and scales, as the kernels take them."""
        form = self.form
        if isinstance(form, sparse.Bitmask):
            parts = (form.bits.data_ptr(), form.starts.data_ptr(), 0)
        else:
            parts = (0, 0, form.metadata.data_ptr())
        return (form.values.data_ptr(), *parts, self.scales.data_ptr())

    def _kernel(self, inputs: int, bias: int, targets: int, out: Tensor, tokens: int) -> None:
        machine = (out.itemsize, torch.get_num_threads())
        arguments = (*self._addresses(), inputs, bias, targets, out.data_ptr())
        sparse.EXTENSION.int8_linear(*arguments, *self.shape, tokens, out.shape[1], *machine)


def scales_of(weight: Tensor, largest: int = LARGEST) -> Tensor:
    """The scales (c, ceil(b/128)) float16 of a weight (c, b): the largest of a group becomes ``largest``, or nearly.

    They are infinite where a weight is too large for a float16 scale.
    """
    groups = -(-weight.shape[1] // GROUP)
    padded = torch.nn.functional.pad(weight.detach().abs(), (0, groups * GROUP - weight.shape[1]))
    scales = (padded.unflatten(1, (groups, GROUP)).amax(2).float() / largest).to(torch.float16)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def quantise(weight: Tensor, scales: Tensor, largest: int = LARGEST) -> Tensor:
    """A weight (c, b) as whole numbers up to ``largest`` or minus that, int8: to the nearest, ties to even."""
    spread = scales.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    return (weight.float() / spread).round_().clamp_(-largest, largest).to(torch.int8)


def rounded(weight: Tensor, largest: int = LARGEST) -> Tensor:
    """What a weight (c, b) becomes as int8 values with their scales, float32; int4 values where 7 is the largest.

    A group with a weight too large for a float16 scale becomes no number.
    """
    scales = scales_of(weight, largest)
    return quantise(weight, scales, largest).float() * scales.float().repeat_interleave(GROUP, 1)[:, : weight.shape[1]]


def as_int8(weight: Tensor, form: sparse.Bitmask | sparse.Rows24) -> Int8:
    """The int8 weight of the same kept places as ``form``, which holds ``weight`` (c, b).

    Raises:
        ValueError: a weight is not finite, or too large for a float16 scale.
    """
    scales = scales_of(weight)
    if not bool(scales.isfinite().all()):
        raise ValueError(TOO_LARGE)
    whole = quantise(weight, scales)
    if isinstance(form, sparse.Bitmask):
        shifts = torch.arange(sparse.WORD, dtype=torch.int64, device=form.bits.device)
        kept = (form.bits[:, :, None] >> shifts & 1).flatten(1)[:, : weight.shape[1]].bool()
        return Int8(sparse.Bitmask(whole.masked_select(kept), form.bits, form.starts, form.shape), scales, weight.dtype)
    positions = unpack_24_codes(form.metadata)
    values = whole.unflatten(1, (-1, 4)).gather(2, positions).flatten(1)
    return Int8(sparse.Rows24(values.contiguous(), form.metadata, form.shape), scales, weight.dtype)
