"""What pruning a large model takes on one GPU or many: ``python -m benchmarks.cluster`` makes docs/scaling.md's tables.

No GPU is timed. The layers' shapes give flops and bytes, data sheets their rates, and the measured time of layers on a
CPU, in dense products (GE), what pruning adds to its products. So the hours are bounds from below, and the shares say
what a larger number of processes does not make faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from statistics import linear_regression

import click

from benchmarks.records import read
from benchmarks.report.markdown import put_between, table

TOKENS, LENGTH = 128 * 2048, 2048  # the command's default
BLOCK = 128
_DIGITS = (11, 10, 10)  # bits of a score that one round of counts of the global mask settles
_RESULTS = Path(__file__).parent / "results" / "layer.jsonl"
_FROM_COLUMNS = 2048  # narrower layers fit into a CPU's cache


@dataclass(frozen=True)
class Machine:
    """Peaks by the data sheets, and what is assumed of the rest.

    Attributes:
        half, single: flop/s of dense products in 16 bits, and of float32 on the ordinary units.
        bus: bytes/s from host memory to one GPU.
        links: bytes/s that one GPU sends, to those of its host and beyond.
        waits: seconds of the smallest exchange among processes, within a host and beyond.
        disk: bytes/s read or written by one host.
        each: GPUs in a host.
        memory: bytes of a GPU.
    """

    half: float
    single: float
    bus: float
    links: tuple[float, float] = (450e9, 50e9)
    waits: tuple[float, float] = (20e-6, 50e-6)
    disk: float = 3e9
    each: int = 8
    memory: float = 80 * 2**30

    def link(self, size: int) -> float:
        return self.links[size > self.each]

    def wait(self, size: int) -> float:
        return self.waits[size > self.each] if size > 1 else 0.0


H100 = Machine(half=989e12, single=67e12, bus=64e9)
RTX_4090 = Machine(half=165e12, single=82.6e12, bus=32e9, memory=24 * 2**30)


@dataclass(frozen=True)
class Inputs:
    """Layers that share an input of ``columns``, by their rows, in each of ``experts`` alike.

    A layer of a mixture sees ``share`` of the tokens; 0 experts stand for an ordinary layer.
    """

    columns: int
    rows: tuple[int, ...]
    experts: int = 0
    share: float = 1.0

    @property
    def weights(self) -> int:
        return self.columns * sum(self.rows) * max(1, self.experts)


@dataclass(frozen=True)
class Model:
    """Blocks by how often they occur; ``outside``: weights of embeddings and head, ``attention``: heads x width."""

    name: str
    width: int
    attention: int
    outside: int
    blocks: tuple[tuple[int, tuple[Inputs, ...]], ...]

    @property
    def weights(self) -> int:
        return self.outside + sum(count * _weights(block) for count, block in self.blocks)

    @property
    def largest(self) -> int:
        """Weights of the largest block."""
        return max(_weights(block) for _, block in self.blocks)


def _weights(block: Iterable[Inputs]) -> int:
    return sum(inputs.weights for inputs in block)


def _dense(width: int, inner: int) -> tuple[Inputs, ...]:
    return Inputs(width, (inner, inner)), Inputs(inner, (width,))


def _experts(width: int, inner: int, count: int, used: int) -> tuple[Inputs, ...]:
    return Inputs(width, (2 * inner,), count, used / count), Inputs(inner, (width,), count, used / count)


_LLAMA = (Inputs(8192, (8192, 1024, 1024)), Inputs(8192, (8192,)), *_dense(8192, 28672))
_QWEN = (Inputs(4096, (8192, 512, 512)), Inputs(8192, (4096,)), *_experts(4096, 1536, 128, 8))
_LATENT = (Inputs(7168, (1536, 576)), Inputs(1536, (24576,)), Inputs(512, (32768,)), Inputs(16384, (7168,)))
_DEEPSEEK = (*_LATENT, *_experts(7168, 2048, 256, 8), *_dense(7168, 2048))
MODELS = (
    Model("LLaMA-3 70B", 8192, 8192, 2 * 128256 * 8192, ((80, _LLAMA),)),
    Model("Qwen3-235B-A22B", 4096, 8192, 2 * 151936 * 4096, ((94, _QWEN),)),
    Model("DeepSeek-V3", 7168, 24576, 2 * 129280 * 7168, ((3, (*_LATENT, *_dense(7168, 18432))), (58, _DEEPSEEK))),
)


@dataclass(frozen=True)
class Time:
    """Seconds by what takes them."""

    forward: float = 0.0
    hessians: float = 0.0
    rows: float = 0.0
    experts: float = 0.0
    factors: float = 0.0
    sums: float = 0.0
    thresholds: float = 0.0
    weights: float = 0.0
    files: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Time) -> Time:
        return Time(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, count: float) -> Time:
        return Time(*(count * getattr(self, field.name) for field in fields(self)))


@lru_cache(maxsize=1)
def rates() -> tuple[float, float]:
    """The a and d of ``GE = a + d b / c``, by least squares over layers measured at 50% with 2048 columns or more."""
    rows = [
        row
        for row in read(_RESULTS).rows
        if (row["kind"], row["method"], row["pattern"], row["backend"]) == ("layer", "thanos", "0.5", "auto")
        and row["columns"] >= _FROM_COLUMNS
    ]
    fit = linear_regression([row["columns"] / row["rows"] for row in rows], [row["ge"] for row in rows])
    return fit.intercept, fit.slope


def block_time(block: Iterable[Inputs], attention: int, machine: Machine, size: int, tokens: int = TOKENS) -> Time:
    """Seconds of one block on ``size`` processes, each with a GPU: a pass over the samples for each group of experts
    whose Hessians fit half of what the block leaves of the memory, at least one, and one for the next block."""
    block = tuple(block)
    scale, factor = (2 * rate / machine.single for rate in rates())
    link, wait = machine.link(size), machine.wait(size)
    flops = sum(2 * inputs.weights * inputs.share for inputs in block) + 2 * LENGTH * attention
    moved = 2.0 * _weights(block)
    hessians = sum(4.0 * inputs.columns**2 * inputs.experts for inputs in block)
    passes = 1 + max(1, math.ceil(2 * hessians / max(1.0, machine.memory - moved)))
    exchanged = sent(block, size)
    time = Time(
        forward=passes * flops * tokens / size / machine.half,
        sums=exchanged["Hessians"] / link,
        thresholds=exchanged["thresholds"] / link,
        weights=exchanged["weights"] / link,
        files=moved * (2 / machine.disk + 2 / machine.bus),
    )
    for inputs in block:
        b, c = inputs.columns, sum(inputs.rows)
        time += Time(hessians=max(1, inputs.experts) * inputs.share * tokens * b**2 / size / machine.half)
        if inputs.experts:
            at_most = math.ceil(inputs.experts / size)
            waits = wait * inputs.experts
            time += Time(experts=at_most * (scale * c * b**2 + factor * b**3), sums=waits, weights=waits)
        else:
            time += Time(
                rows=scale * c * b**2 / size,
                factors=factor * b**3,
                sums=wait,
                thresholds=_rounds(inputs) * (len(_DIGITS) + 1) * wait,
                weights=wait * len(inputs.rows),
            )
    return time


def _rounds(inputs: Inputs) -> int:
    """How often a threshold is found for the layers of an ordinary input: once for each block of columns."""
    return math.ceil(inputs.columns / BLOCK) * len(inputs.rows)


def model_time(model: Model, machine: Machine, size: int) -> Time:
    """Seconds of a whole model on ``size`` processes."""
    parts = [block_time(block, model.attention, machine, size).times(count) for count, block in model.blocks]
    return sum(parts, Time())


def sent(block: Iterable[Inputs], size: int) -> dict[str, float]:
    """Bytes that each of ``size`` processes sends for one block, by what they are."""
    found, pools = {"Hessians": 0.0, "thresholds": 0.0, "weights": 0.0}, set()
    most = (size - 1) / size
    for inputs in block:
        b, copies = inputs.columns, max(1, inputs.experts)
        if inputs.experts:
            found["Hessians"] += 4 * b**2 * (copies + 2 * (b not in pools)) * most
            found["weights"] += 2 * inputs.weights * most
            pools.add(b)
        else:
            found["Hessians"] += 8 * b**2 * most
            found["thresholds"] += _rounds(inputs) * sum(4 * 2**bits for bits in _DIGITS) * (size - 1)
            found["weights"] += 4 * inputs.weights * most
    return found


def gpu_bytes(model: Model, tokens: int = LENGTH) -> dict[str, float]:
    """Bytes on a GPU while the hungriest block is there: its weights, the Hessians of ordinary inputs, a layer at work.

    Experts come in groups whose Hessians fit ``--memory-limit``; at least one expert must fit. ``tokens`` of one batch
    go through a block at a time.
    """
    found = {"block": 2.0 * model.largest, "Hessians": 0.0, "layer": 0.0, "activations": 0.0}
    for _, block in model.blocks:
        ordinary = sum(4.0 * inputs.columns**2 for inputs in block if not inputs.experts)
        expert = max((4.0 * inputs.columns**2 for inputs in block if inputs.experts), default=0.0)
        pools = sum(4.0 * columns**2 for columns in {inputs.columns for inputs in block if inputs.experts})
        found["Hessians"] = max(found["Hessians"], ordinary + expert + pools)
        for inputs in block:  # float32: two copies of the weight and a half, the Hessian, its factor, their workspace
            layer = 4 * (1.4 * max(inputs.rows) * inputs.columns + 2.2 * inputs.columns**2)
            found["layer"] = max(found["layer"], layer)
            found["activations"] = max(found["activations"], 2.0 * tokens * (2 * inputs.columns + sum(inputs.rows)))
    return found


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2f}" if hours < 10 else f"{hours:.0f}"


def one_gpu() -> str:
    """What a model needs on one GPU of 24 GiB in a machine with 64 GiB of memory."""
    lines = []
    for model in MODELS:
        gpu, time = gpu_bytes(model, 2 * LENGTH), model_time(model, RTX_4090, 1)
        needed, size = sum(gpu.values()), 2 * model.weights / 1e9
        host, hidden = 2.0 * model.outside + 4 * model.largest, 2.0 * TOKENS * model.width
        fits = _hours(time.total) if needed <= RTX_4090.memory else "does not fit"
        lines.append(
            [model.name, *(f"{value / 2**30:.1f}" for value in (*gpu.values(), needed, host, hidden)),
             f"{size:.0f} + {size:.0f}", fits]
        )  # fmt: skip
    heads = ["model", "a block", "Hessians", "a layer", "activations", "in all, GiB of the GPU", "GiB of memory",
             "GiB of hidden states", "GB of disk", "hours at least"]  # fmt: skip
    return table(heads, lines)


def exchanged() -> str:
    """Bytes that one process sends for one block."""
    lines = []
    for model in MODELS:
        block = model.blocks[-1][1]
        for size in (8, 64):
            parts = sent(block, size)
            lines.append([model.name, str(size), *(f"{value / 1e9:.2f}" for value in parts.values())])
    return table(["model", "processes", "Hessians, GB", "thresholds, GB", "pruned weights, GB"], lines)


def hours() -> str:
    """Hours on 1, 8 and 64 H100."""
    lines = [[model.name, *(_hours(model_time(model, H100, size).total) for size in (1, 8, 64))] for model in MODELS]
    return table(["model", "1 H100", "8", "64"], lines)


def simulated(model: Model) -> str:
    """Hours and what they go to, from 1 to 512 H100."""
    parts: dict[str, Callable[[Time], float]] = {
        "forward": lambda time: time.forward + time.hessians,
        "rows and experts": lambda time: time.rows + time.experts,
        "factors": lambda time: time.factors,
        "exchange": lambda time: time.sums + time.thresholds + time.weights,
        "files": lambda time: time.files,
    }
    lines, alone = [], model_time(model, H100, 1)
    for size in (1, 2, 4, 8, 16, 32, 64, 512):
        time = model_time(model, H100, size)
        work = time.total - time.files
        efficiency = (alone.total - alone.files) / work / size
        lines.append(
            [str(size), f"{time.total / 60:.1f}", f"{work / 60:.2f}", f"{100 * efficiency:.0f}%",
             *(f"{part(time) / 60:.2f}" for part in parts.values())]
        )  # fmt: skip
    return table(["H100", "minutes", "without files", "efficiency of that", *parts], lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "one-gpu": one_gpu,
    "hours": hours,
    "exchanged": exchanged,
    **{f"simulated {model.name}": partial(simulated, model) for model in MODELS},
}


def filled(text: str) -> str:
    """The page with the tables between its markers."""
    for name, section in SECTIONS.items():
        text = put_between(text, name, section())
    return text


@click.command(help=__doc__)
@click.option("--write", type=click.Path(exists=True, path_type=Path), help="A page; gets the tables at its markers.")
def main(write: Path | None) -> None:
    if write is not None:
        write.write_text(filled(write.read_text(encoding="utf-8")), encoding="utf-8")
        return
    a, d = rates()
    click.echo(f"A layer of c x b takes {a:.2f} + {d:.2f} b / c GE.")
    for name, section in SECTIONS.items():
        click.echo(f"\n{name}\n\n{section()}")


if __name__ == "__main__":
    main()
