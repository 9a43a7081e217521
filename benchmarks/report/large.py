"""Large models: a block of a mixture, a model read from its files, and two processes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.large import GIB
from benchmarks.records import Row
from benchmarks.report.markdown import number, percent


def _experts(row: Row) -> str:
    return (
        f"A block of Qwen3-30B-A3B's shapes with {row['experts']} experts ({row['weights'] / 1e6:.0f} million weights, "
        f"random, bfloat16; {row['samples']} x {row['length']} random tokens, the least routed expert saw "
        f"{row['fewest_tokens']}), pruned at 50% with a memory limit of {number(row['memory_limit'])} GiB: "
        f"{number(row['peak'] / GIB)} GiB beside the block's weights (6 were "
        f"asked), {number(row['seconds'])} s, {number(row['walk_ge'])} GE with the forwards and Hessians, "
        f"{number(row['prune_ge'])} GE without."
    )


def _stream(row: Row) -> str:
    return (
        "TinyLlama-1.1B's shapes (random, bfloat16, 16 x 256 tokens, 50%), the whole command with one thread: "
        f"{number(row['memory_seconds'])} s and at most {number(row['memory_peak'] / GIB)} GiB of anonymous memory in "
        f"memory, {number(row['files_seconds'])} s ({number(row['ratio'])} times as long) and "
        f"{number(row['files_peak'] / GIB)} GiB from its files, with the same bytes; " + _limited(row)
    )


def _limited(row: Row) -> str:
    if row["limited_seconds"] is None:
        return f"under RLIMIT_DATA of {number(row['limit'])} GiB it did not finish."
    return (
        f"under RLIMIT_DATA of {number(row['limit'])} GiB, which counts what is reserved and thread stacks too, it "
        f"finished in {number(row['limited_seconds'])} s."
    )


def _processes(row: Row) -> str:
    return (
        "SmolLM2-135M (float32, 32 x 512 tokens, 50%) by two processes of one thread each: the walk takes "
        f"{number(row['two_walk'])} s where one process of one thread takes {number(row['one_walk'])} s "
        f"({number(row['walk_ratio'])} times as fast; with start and loading {number(row['ratio'])} times), and "
        f"{percent(row['agreement'])} of the masks agree."
    )


_SAID: dict[str, Callable[[Row], str]] = {"experts": _experts, "stream": _stream, "processes": _processes}


def large(found: list[Row]) -> list[str]:
    """A sentence for each record."""
    items = [f"- {_SAID[row['kind']](row)}" for row in found]
    return ["\n".join(items), "Made by `python -m benchmarks.large --results benchmarks/results`."]
