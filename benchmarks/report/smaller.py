"""Smaller models and llama.cpp: what choosing channels costs, how models run there, and the compact form beside it."""

from __future__ import annotations

from benchmarks.llama_cpp import told
from benchmarks.llama_tools import PROMPT_TOKENS
from benchmarks.records import Row
from benchmarks.report.markdown import number, percent, table
from benchmarks.report.speed import shape_of


def removals(found: list[Row]) -> list[str]:
    rows = [
        [f"{r['model']} {r['layer']}", shape_of(r), f"{r['removed']} of {r['columns']}", number(r["seconds"]),
         number(r["ge"]), number(r["limit_ge"]), *(number(r["steps"][step] / r["ge_seconds"]) for step in _STEPS)]
        for r in found
    ]  # fmt: skip
    text = (
        "What a layer that reads channels costs once its Hessian is known: the factor, the greedy choice of columns "
        "one at a time, and the exact update of the others."
    )
    header = ["layer", "shape", "columns removed", "seconds", "GE", "to reach", *_STEPS]
    return [text, table(header, rows, left=3)]


_STEPS = ("factor", "remove")


def in_llama_cpp(found: list[Row]) -> list[str]:
    """A row for each model and file type; ratios are to the first model of the same type, run in turns with it."""
    rows = []
    for r in found:
        dense = next(other for other in found if other["type"] == r["type"])
        own = [f"{number(r[key])} ({number(r[f'{key}_ratio'])} x)" for key in ("decode", "read")]
        size = f"{r['bytes'] / 1e6:.0f} ({percent(r['bytes'] / dense['bytes'], 0)})"
        rows.append([r["model"], r["type"], told(r["agree"], r["gap"]), size, *own])
    names = ", ".join(dict.fromkeys(r["model"] for r in found))
    text = (
        "Converted by llama.cpp's converter, quantised by llama.cpp and run there: megabytes, tokens a second at "
        f"decoding and at a prompt of {PROMPT_TOKENS} tokens, and how many of the first greedy tokens are those of "
        "Transformers in float32. In brackets the ratio to the first model at the same type, the models taking turns."
    )
    header = ["model", "type", "greedy tokens", "MB", "decoding", "reading"]
    return [text, table(header, rows, left=3), f"Made by `python -m benchmarks.llama_cpp` with {names}."]


def side_by_side(found: list[Row]) -> str:
    """A row for each form of one model; ratios are to the first, run in turns with it."""
    rows = []
    for r in found:
        speeds = [f"{number(r[key])} ({number(r[key] / found[0][key])} x)" for key in ("decode", "read")]
        rows.append([r["name"], *(f"{r[key] / 1e6:,.0f}" for key in ("bytes", "resident")), *speeds])
    return table(["form", "MB", "resident MB", "decoding", "reading"], rows)


def side_by_side_section(found: list[Row]) -> list[str]:
    text = (
        "A model of TinyLlama-1.1B's shapes with random weights, half of the blocks' zero where it is compact: "
        "megabytes on disk, by how much the process grew, and tokens a second at decoding and at a prompt of "
        f"{PROMPT_TOKENS} tokens. Every turn is a process of its own, and the forms take turns "
        f"({found[0]['turns']} each; medians). In brackets the ratio to the dense model in Transformers."
    )
    return [text, side_by_side(found), "Made by `python -m benchmarks.side_by_side`."]
