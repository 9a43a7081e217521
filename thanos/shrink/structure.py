"""Which slices of a block's parameters belong to a channel or a head, found by differentiating the block.

Every linear layer's output is replaced by random numbers, and the input of each layer is differentiated with respect to
them. A layer whose every input channel depends on rows of its own, at the same token, reads a feed-forward's hidden
channels (``down_proj``); one that depends on other tokens too reads the heads of attention (``o_proj``). The same
derivatives say which rows feed which channel or head, whatever the order in which a fused projection keeps them, and
which norm gains or biases are theirs. No name of a module matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thanos.walk.decoder import Layer
from thanos.walk.replay import Call

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Cut:
    """A parameter whose slices belong to channels, heads or groups of heads.

    Attributes:
        parameter: its name in the block.
        axis: along which it is cut.
        owner: (slices,), int64: the channel or head that each slice along ``axis`` serves; heads are followed by the
            numbers of groups, for slices that serve all heads of a group.
    """

    parameter: str
    axis: int
    owner: Tensor


@dataclass(frozen=True)
class Site:
    """A layer whose input channels can be removed with everything that feeds them.

    Attributes:
        name: of the layer, in the block.
        kind: ``channels`` or ``heads``.
        units: how many channels or query heads there are; each head is as many input channels.
        group: (units,), int64: the key and value head of each query head; each channel is a group of its own.
        cuts: what is cut along with it, the layer's own input included.
        adds: where the layer's output enters the block's as a multiple of itself, added to the rest: that multiple.
    """

    name: str
    kind: str
    units: int
    group: Tensor
    cuts: tuple[Cut, ...]
    adds: float | None = None

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1

    def kept(self, cut: Cut, units: Tensor) -> Tensor:
        """(slices,), bool: which slices of a cut stay when ``units`` (units,), bool, stay.

        A slice that serves a group stays while any of its heads does.
        """
        groups = torch.zeros(self.groups, dtype=torch.bool, device="cpu")
        groups[self.group[units]] = True
        return torch.cat([units, groups])[cut.owner]


@dataclass(frozen=True)
class Sites:
    """What of a block can be cut, and why the rest cannot."""

    channels: Site | None
    heads: Site | None
    reason: dict[str, str]


class _Unfit(Exception):  # noqa: N818
    """Why a layer is no site, in words that follow the layer's name."""


def find_sites(block: nn.Module, layers: Sequence[Layer], call: Call, hidden: Tensor, heads: int | None) -> Sites:
    """The feed-forward and the attention of a block.

    Args:
        block: a decoder block.
        layers: its linear layers.
        call: how it is called with ``hidden`` (1, tokens, width); eight tokens do.
        heads: the query heads that the configuration states, if it does.
    """
    names = {id(module): name for name, module in block.named_modules()}
    own = {names[id(layer.module)]: layer.module for layer in layers}
    with torch.enable_grad(), _tracing(block, own) as trace:
        output = call(block, hidden.detach())
        found: dict[str, list[Site]] = {"channels": [], "heads": []}
        reason: dict[str, str] = {}
        for name, inputs in trace.inputs.items():
            sources = [source for source in trace.reach(inputs) if source != name]
            if not sources or not inputs.requires_grad:
                continue
            kind = "heads" if trace.mixes_tokens(inputs, sources) else "channels"
            try:
                site = _channel_site(trace, name) if kind == "channels" else _head_site(trace, name, heads)
                _check_exclusive(trace, name, sources, output)
                found[kind].append(replace(site, adds=trace.adds(output, name)))
            except _Unfit as unfit:
                if kind == "heads" or str(unfit) != _MIXED:  # a projection behind a norm mixes all channels before it
                    reason.setdefault(kind, f"{name}: {unfit}")
    sites: dict[str, Site | None] = {}
    for kind, candidates in found.items():
        sites[kind] = candidates[0] if len(candidates) == 1 else None
        if len(candidates) > 1:
            reason[kind] = f"{' and '.join(site.name for site in candidates)} each read {kind} of their own"
        elif not candidates:
            reason.setdefault(kind, f"no layer of it reads {kind} that could be removed one by one")
    return Sites(sites["channels"], sites["heads"], reason)


_ROUNDING = 0.01  # of 16-bit gradients
_MIXED = "its input channels depend on the same weights"


class _Trace:
    """A run of a block with random outputs of its linear layers: what each layer was given, and what it depends on."""

    def __init__(self, block: nn.Module, layers: dict[str, nn.Module]) -> None:
        inside = {id(parameter) for module in layers.values() for parameter in module.parameters(recurse=False)}
        self.layers = layers
        self.parameters = dict(block.named_parameters())
        self.others = {name: p for name, p in self.parameters.items() if id(p) not in inside and p.is_floating_point()}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def gradients(self, value: Tensor, cotangent: Tensor, names: Sequence[str]) -> dict[str, Tensor | None]:
        """Of ``sum(value * cotangent)`` for the named outputs and other parameters, None where it does not depend."""
        at = [self.outputs[name] if name in self.outputs else self.others[name] for name in names]
        given = torch.autograd.grad(value, at, cotangent, retain_graph=True, allow_unused=True)
        return dict(zip(names, given, strict=True))

    def reach(self, value: Tensor) -> list[str]:
        """The layers whose output ``value`` depends on without another layer between."""
        if not value.requires_grad:
            return []
        given = self.gradients(value, _random(value), list(self.outputs))
        return [name for name, gradient in given.items() if gradient is not None and bool(gradient.any())]

    def mixes_tokens(self, value: Tensor, sources: Sequence[str]) -> bool:
        """Whether the last token of ``value`` depends on earlier ones."""
        cotangent = torch.zeros_like(value)
        cotangent[..., -1, :] = torch.randn_like(cotangent[..., -1, :])
        given = self.gradients(value, cotangent, sources)
        return any(bool(one[..., :-1, :].any()) for one in given.values() if one is not None)

    def adds(self, value: Tensor, name: str) -> float | None:
        """The k with ``value = k output + rest``, for the output of the named layer; None where there is none."""
        cotangent = _random(value)
        gradient = self.gradients(value, cotangent, [name])[name]
        read = any(name in self.reach(inputs) for inputs in self.inputs.values())  # by another layer
        if gradient is None or gradient.numel() != cotangent.numel() or read:
            return None
        found, wanted = gradient.flatten().double(), cotangent.flatten().double()
        k = float(found @ wanted / (wanted @ wanted))
        return k if bool((found - k * wanted).norm() <= _ROUNDING * abs(k) * wanted.norm()) else None

    def rows(self, value: Tensor, cotangent: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Of each named output the rows (n,), of each parameter the elements, that ``sum(value * cotangent)`` uses."""
        found = {}
        for name, gradient in self.gradients(value, cotangent, names).items():
            if gradient is None:
                shape = self.outputs[name].shape[-1:] if name in self.outputs else self.others[name].shape
                found[name] = torch.zeros(shape, dtype=torch.bool, device="cpu")
            else:
                used = gradient != 0
                found[name] = (used.flatten(0, -2).any(0) if name in self.outputs else used).cpu()
        return found

    def slices(self, name: str) -> tuple[tuple[str, int], ...]:
        """The parameters, with the axis, that the rows of a layer's output are."""
        weight = (f"{name}.weight".lstrip("."), 1 if isinstance(self.layers[name], Conv1D) else 0)
        bias = f"{name}.bias".lstrip(".")
        return (weight, (bias, 0)) if bias in self.parameters else (weight,)

    def reads(self, name: str) -> tuple[str, int]:
        """The parameter and the axis that a layer's input channels are."""
        return f"{name}.weight".lstrip("."), 0 if isinstance(self.layers[name], Conv1D) else 1


@contextmanager
def _tracing(block: nn.Module, layers: dict[str, nn.Module]) -> Iterator[_Trace]:
    trace = _Trace(block, layers)
    frozen = [parameter for parameter in trace.others.values() if not parameter.requires_grad]

    def before(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trace.inputs[name] = args[0] if args else next(iter(kwargs.values()))

        return keep

    def after(name: str) -> Any:
        def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            trace.outputs[name] = _antithetic(output).requires_grad_()
            return trace.outputs[name] * 1

        return replace

    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in frozen:
            parameter.requires_grad_()
            stack.callback(parameter.requires_grad_, False)
        for name, module in layers.items():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        yield trace


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _random(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=torch.float32, device="cpu").to(like)


def _antithetic(like: Tensor) -> Tensor:
    """Random numbers that come with both signs in each channel: no rectifier is silent on all tokens."""
    value = _random(like).detach()
    half = value.shape[-2] // 2
    value[..., half : 2 * half, :] = -value[..., :half, :]
    return value


def _sources(trace: _Trace, inputs: Tensor) -> list[str]:
    given = trace.gradients(inputs, _random(inputs), [*trace.outputs, *trace.others])
    return [name for name, gradient in given.items() if gradient is not None and bool(gradient.any())]


def _channel_site(trace: _Trace, name: str) -> Site:
    """Number the channels in binary: for each digit, differentiate those that have it and those that have not."""
    inputs = trace.inputs[name]
    width, sources = inputs.shape[-1], _sources(trace, inputs)
    cotangent, numbers = _random(inputs), torch.arange(width, dtype=torch.int64, device=inputs.device)
    owner: dict[str, Tensor] = {}
    shared: dict[str, bool] = {}
    for digit in range(max(1, (width - 1).bit_length())):
        have = (numbers >> digit & 1).to(inputs.dtype)
        ones = trace.rows(inputs, cotangent * have, sources)
        zeros = trace.rows(inputs, cotangent * (1 - have), sources)
        for source in sources:
            both = ones[source] & zeros[source]
            if source in trace.outputs and bool(both.any()):
                raise _Unfit(_MIXED)
            if source in trace.outputs and not bool((ones[source] | zeros[source]).all()):
                raise _Unfit(f"only some of the rows of {source} feed it")
            shared[source] = shared.get(source, False) or bool(both.any())
            code = ones[source].long() << digit
            owner[source] = owner[source] + code if source in owner else code
    cuts = [Cut(*trace.reads(name), _numbers(width))]
    for source in sources:
        if source in trace.outputs:
            cuts += [Cut(*place, owner[source]) for place in trace.slices(source)]
        elif not shared[source]:
            cuts.append(_parameter_cut(source, owner[source], width, name))
    return Site(name, "channels", width, _numbers(width), tuple(cuts))


def _parameter_cut(source: str, owner: Tensor, width: int, name: str) -> Cut:
    """A parameter with one element, or one slice, for each channel."""
    for axis in range(owner.dim()):
        rows = owner.movedim(axis, 0).flatten(1)
        if len(rows) == width and bool((rows == rows[:, :1]).all()):
            return Cut(source, axis, rows[:, 0].clone())
    raise _Unfit(f"{source}, which lies in front of it, has no slice for each of the {width} channels")


def _head_site(trace: _Trace, name: str, heads: int | None) -> Site:
    """Differentiate one head after the other; a row serves one head, or all heads of a group."""
    inputs = trace.inputs[name]
    width, sources = inputs.shape[-1], _sources(trace, inputs)
    if not heads or width % heads:
        raise _Unfit(f"its {width} input channels are no whole number of the configuration's {heads or 0} heads")
    size, cotangent = width // heads, _random(inputs)
    uses: dict[str, list[Tensor]] = {source: [] for source in sources}
    for head in range(heads):
        part = torch.zeros_like(cotangent)
        part[..., head * size : (head + 1) * size] = cotangent[..., head * size : (head + 1) * size]
        for source, rows in trace.rows(inputs, part, sources).items():
            uses[source].append(rows)
    serves = {source: torch.stack(rows, -1) for source, rows in uses.items()}  # (rows, heads), (*shape, heads)
    group = _groups(torch.cat([rows for source, rows in serves.items() if source in trace.outputs]), heads)
    cuts = [Cut(*trace.reads(name), _numbers(width) // size)]
    for source in sources:
        places = trace.slices(source) if source in trace.outputs else ()
        rows = serves[source]
        if source in trace.others:
            if bool(rows.all()):
                continue  # shared by all heads
            split = [_by_slice(rows, axis) for axis in range(rows.dim() - 1)]
            axis = next((axis for axis, flat in enumerate(split) if bool((flat == flat[:, :1]).all())), None)
            if axis is None:
                raise _Unfit(f"{source}, which lies in front of it, cannot be split by heads")
            rows, places = split[axis][:, 0], ((source, axis),)
        cuts += [_head_cut(place, rows, group) for place in places]
    return Site(name, "heads", heads, group, tuple(cuts))


def _by_slice(rows: Tensor, axis: int) -> Tensor:
    """(slices, elements, heads) of a parameter's elements (*shape, heads), for its slices along ``axis``."""
    front = rows.movedim(axis, 0)
    return front.reshape(len(front), -1, rows.shape[-1])


def _groups(rows: Tensor, heads: int) -> Tensor:
    """The group of each head, from the sets of heads (rows, heads) that the rows serve.

    With multi-head attention every row serves one head. Else the key and value rows serve the heads of a group.
    """
    count = rows.sum(1)
    single = rows[count == 1].sum(0)
    if bool((count == 0).any()):
        raise _Unfit("some rows of its projections feed no head")
    wide = rows[count > 1]
    if bool((single == 0).any()) or bool((single != single[0]).any()):
        raise _Unfit("its heads are not independent: a norm or a projection runs across them")
    if not len(wide):
        return _numbers(heads)
    sets, tally = wide.unique(dim=0, return_counts=True)
    sizes = sets.sum(1)
    if bool((sets.sum(0) != 1).any()) or len(sizes.unique()) > 1 or len(tally.unique()) > 1:
        raise _Unfit("its key and value heads are not shared by groups of equal size")
    if int(tally[0]) > 2 * int(single[0]):
        raise _Unfit("its heads are not independent: a norm or a projection runs across them")
    first = sets.long().argmax(1)  # the first head of each set
    order = first.argsort()
    return sets[order].long().argmax(0)


def _head_cut(place: tuple[str, int], rows: Tensor, group: Tensor) -> Cut:
    """A cut for slices that serve a head each, or a group each; fused projections have both."""
    head, alone = rows.long().argmax(1), rows.sum(1) == 1
    return Cut(*place, torch.where(alone, head, len(group) + group[head]))


def _check_exclusive(trace: _Trace, name: str, sources: Sequence[str], output: Tensor) -> None:
    """Nothing else may read what feeds a site."""
    layers = [source for source in sources if source in trace.outputs]
    others = {other: value for other, value in trace.inputs.items() if other != name and value.requires_grad}
    for other, value in {**others, "the block's output": output}.items():
        if not value.requires_grad:
            continue
        for source in set(trace.reach(value)) & set(layers):
            raise _Unfit(f"{source}, which feeds it, also feeds {other}")
