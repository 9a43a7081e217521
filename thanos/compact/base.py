"""What the sparse layers share: the interface of ``nn.Linear``, loading, and the care of outlier rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as dense_product
from typing_extensions import Self

from thanos.linear import is_linear, is_plain, weight_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseLinear(nn.Module):
    """What the three layers share. Buffers named in ``_sized`` take the size they are loaded with.

    The buffer named by ``_typed`` has the dtype that the layer computes in.
    """

    _sized: tuple[str, ...] = ()
    _typed = "values"
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if dtype not in _DTYPES:
            raise TypeError(f"{type(self).__name__} holds float32, bfloat16 or float16 weights, not {dtype}")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
        self._on_device: Tensor | None = None
        self._make_buffers(device, dtype)

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Register what holds the weight, as it is before anything is loaded."""
        raise NotImplementedError

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """The layer with the weights of ``linear``: an ``nn.Linear``, or transformers' ``Conv1D`` (weight transposed).

        Raises:
            TypeError: it is neither, or its dtype is not float32, bfloat16 or float16.
            ValueError: the weight does not have the pattern of this layer.
        """
        weight = dense_weight(linear)
        out_features, in_features = weight.shape
        bias = linear.bias
        layer = cls(in_features, out_features, bias is not None, weight.device, weight.dtype)
        layer._compress(weight)
        if bias is not None:
            assert isinstance(bias, Tensor)
            layer.bias = bias.detach().clone()
        layer._derive()
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features) decoded: a new tensor at each call."""
        raise NotImplementedError

    @property
    def _form(self) -> Any:
        """The weight in the form that the operations take: where there are outlier rows, the other rows."""
        raise NotImplementedError

    def _compress(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _derive(self) -> None:
        """Check the buffers against each other and compute what follows from them."""
        raise NotImplementedError

    def _product(self, inputs: Tensor) -> Tensor:
        """The result for inputs (tokens, in_features), contiguous, where a kernel of ours takes them."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """As ``nn.Linear``; under autocast too, where the product stays in the weights' dtype and then is rounded."""
        device = inputs.device.type
        if inputs.is_meta or not torch.is_autocast_enabled(device):
            return self._linear(inputs)
        with torch.autocast(device, enabled=False):
            if inputs.dtype not in _DTYPES or self._dtype not in _DTYPES:
                return self._linear(inputs)
            return self._linear(inputs.to(self._dtype)).to(torch.get_autocast_dtype(device))

    def _linear(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} has no backward: call it under torch.inference_mode(), or restore the dense "
                "model with thanos.unpack to train it"
            )
        if inputs.shape[-1:] != (self.in_features,):
            raise ValueError(f"inputs of shape {tuple(inputs.shape)} do not end in in_features={self.in_features}")
        if inputs.dtype != self._dtype:
            raise TypeError(f"inputs are {inputs.dtype} and the weights {self._dtype}; convert one with .to()")
        flat = inputs.resolve_neg().reshape(-1, self.in_features).contiguous()
        result = self._product(flat) if flat.device.type in ("cpu", "meta") else self._accelerated(flat)
        return result.view(*inputs.shape[:-1], self.out_features)

    def _accelerated(self, inputs: Tensor) -> Tensor:
        """On a device that has no kernel of ours: the decoded weight, kept there."""
        if self._on_device is None or self._on_device.device != inputs.device:
            self._on_device = self.weight
        return dense_product(inputs, self._on_device, self.bias)

    @property
    def _dtype(self) -> torch.dtype:
        return self.get_buffer(self._typed).dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that stand for the weight; the bias is not counted."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "bias")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={str(self._dtype).removeprefix('torch.')}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and conversions, as of any module; one that the layer could not compute with is refused before it."""
        self.check_conversion(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._on_device = None
        return self

    def check_conversion(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Raise TypeError where a move or conversion gives the buffers dtypes that the layer cannot compute with."""
        before = dict(self.named_buffers(recurse=False))
        kinds = {(buffer.dtype, buffer.device) for buffer in before.values()}
        after = {kind: convert(torch.empty(0, dtype=kind[0], device=kind[1])).dtype for kind in kinds}
        values = self.get_buffer(self._typed)
        wanted = after[values.dtype, values.device]
        if wanted not in (*_DTYPES, torch.float64):
            raise TypeError(
                f"{type(self).__name__} computes in float32, bfloat16, float16 or float64, not {wanted}: restore the "
                "dense model with thanos.unpack to convert it"
            )
        for name, buffer in before.items():
            converted = after[buffer.dtype, buffer.device]
            if not buffer.is_floating_point() and converted != buffer.dtype:
                raise TypeError(
                    f"{name} of {type(self).__name__} is {buffer.dtype} and cannot become {converted}: "
                    "convert the layer with .to(dtype), which leaves whole numbers alone"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._sized:
            loaded, own = state_dict.get(prefix + name), self.get_buffer(name)
            if isinstance(loaded, Tensor) and loaded.dim() == own.dim() and loaded.shape != own.shape:
                setattr(self, name, own.new_empty(loaded.shape))
        before = len(error_msgs)
        for name, own in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and not own.is_floating_point() and loaded.dtype != own.dtype:
                error_msgs.append(f"{prefix}{name} must be {own.dtype}, not {loaded.dtype}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._on_device = None
        if len(error_msgs) == before:
            try:
                self._derive()
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")


def convert_whole(model: nn.Module) -> None:
    """Make moves and conversions of the model, and of its parts, that a sparse layer refuses leave all as it was."""
    for module in model.modules():
        if not isinstance(module, SparseLinear) and any(isinstance(part, SparseLinear) for part in module.modules()):
            module._apply = partial(_apply_to_all, module)  # type: ignore[method-assign]


def _apply_to_all(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    for part in module.modules() if recurse else ():
        if isinstance(part, SparseLinear):
            part.check_conversion(fn)
    return type(module)._apply(module, fn, recurse)


class OutlierRowsLinear(SparseLinear):
    """Some rows compressed, the outlier rows beside them as they were.

    Buffers: ``outliers`` (k, in_features) and ``outlier_rows`` (k,) int64, strictly increasing.
    """

    outliers: Tensor
    outlier_rows: Tensor
    rows: Tensor
    order: Tensor

    def _make_buffers(self, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self.register_buffer("outliers", torch.empty(0, self.in_features, device=device, dtype=dtype))
        self.register_buffer("outlier_rows", torch.empty(0, device=device, dtype=torch.int64))
        for name in ("rows", "order"):
            index = torch.arange(self.out_features, device=device, dtype=torch.int64)
            self.register_buffer(name, index, persistent=False)

    def _split(self, weight: Tensor, outlier: Tensor) -> Tensor:
        """Keep the rows marked in ``outlier`` (c,) bool, and return the others."""
        self.outlier_rows = outlier.nonzero()[:, 0]
        self.outliers = weight[outlier]
        return weight[~outlier].contiguous()

    def _derive(self) -> None:
        values: Tensor = self.get_buffer("values")
        if len(values) + len(self.outliers) != self.out_features or len(self.outliers) != len(self.outlier_rows):
            raise ValueError(
                f"{len(values)} compressed rows, {len(self.outliers)} outlier rows and {len(self.outlier_rows)} of "
                f"their indices do not make {self.out_features} rows"
            )
        self.outliers = self.outliers.contiguous()
        if self.outlier_rows.is_meta:
            return
        check_index("outlier_rows", self.outlier_rows, self.out_features)
        plain = torch.ones(self.out_features, dtype=torch.bool, device=values.device)
        plain[self.outlier_rows] = False
        self.rows = plain.nonzero()[:, 0]
        self.order = torch.cat((self.rows, self.outlier_rows)).argsort()  # of the outputs of both products

    @property
    def _places(self) -> tuple[Any, ...]:
        """The outlier rows and where all rows stand, as the operators take them."""
        held = self._buffers
        return held["outliers"], held["outlier_rows"], held["rows"], held["order"]

    @property
    def weight(self) -> Tensor:
        return torch.cat((self._decoded_rows(), self.outliers))[self.order]

    def _decoded_rows(self) -> Tensor:
        return self._form.decode()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, outlier_rows={len(self.outlier_rows)}"


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) of an ``nn.Linear``, or of transformers' ``Conv1D``, which transposes it."""
    if not is_plain(linear):
        own = " with a forward of its own" if is_linear(linear) else ""
        raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}{own}")
    weight = weight_of(linear)
    if type(weight) is not Tensor or weight.dtype not in _DTYPES:
        what = weight.dtype if type(weight) is Tensor else type(weight).__name__
        raise TypeError(f"from_linear takes float32, bfloat16 or float16 weights, not {what}")
    return weight.contiguous()


def check_index(name: str, index: Tensor, size: int) -> None:
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= size or bool((index.diff() <= 0).any())):
        raise ValueError(f"{name} must increase strictly from 0 to below {size}")
