"""Operations, whole models and GPUs."""

from __future__ import annotations

from benchmarks.gpu import CASES
from benchmarks.records import Row
from benchmarks.report.groups import METHODS, pattern_name
from benchmarks.report.markdown import NOTHING, folded, listing, number, percent, table
from benchmarks.report.speed import shape_of

_SPLIT = ("input_output", "forward", "hessian", "prune", "other")
_ENGINES = {"thanos": "this engine", "llmcompressor": "llm-compressor"}


def operations(found: list[Row]) -> list[str]:
    header = ["operation", "backend", "dtype", "shape", "ms a call", "calls", "GE a layer", "rate", "share of the peak"]
    fast = table(header, [_operation(r) for r in found if r["backend"] != "reference"], left=4)
    slow = table(header, [_operation(r) for r in found if r["backend"] == "reference"], left=4)
    text = (
        "One call of each operation on each backend at hand, how many calls a layer takes and their time in GE, and "
        "the call's share of what the same machine reached in the same run in a float32 product, a bfloat16 product or "
        "a copy."
    )
    return [text, fast, folded("The reference, in plain PyTorch, on fewer rows", slow)]


def _operation(r: Row) -> list[object]:
    rates = [(r.get(key), unit) for key, unit in (("gflops", "GFLOP/s"), ("gbytes_per_second", "GB/s"))]
    rate = next((f"{number(value)} {unit}" for value, unit in rates if value is not None), NOTHING)
    peak = f"{percent(r['peak_share'])} of {r['peak']}" if r.get("peak_share") is not None else NOTHING
    ms = number(1000 * r["seconds"])
    return [f"`{r['op']}`", r["backend"], r["dtype"], shape_of(r), ms, r.get("calls", 1), number(r["ge"]), rate, peak]


def sparse_layers(found: list[Row]) -> list[str]:
    rows = [
        [f"`{r['form']}`", r["dtype"], shape_of(r), r["tokens"], number(1000 * r["seconds"]),
         number(1000 * r["dense_seconds"]), number(r["times_as_fast"]), number(r["at_least"]), number(r["bytes_share"])]
        for r in found
    ]  # fmt: skip
    header = ["layer", "dtype", "shape", "tokens", "ms", "ms, dense", "times as fast", "to reach", "bytes / dense"]
    text = (
        "What runs pruned weights compressed, beside PyTorch's dense layer, the two taking turns: 2:4, unstructured "
        "50% and 30% of the columns removed."
    )
    return [text, table(header, rows, left=3)]


def models(found: list[Row]) -> list[str]:
    rows = [
        [r["model"], _ENGINES.get(r["engine"], r["engine"]), *_pruned(r),
         number(r["total"]), *(number(r["split"].get(part)) for part in _SPLIT), number(r["peak_bytes"] / 2**20),
         number(r["perplexity"])]
        for r in found
    ]  # fmt: skip
    parts = [part.replace("_", " and ") for part in _SPLIT]
    header = ["model", "engine", "method", "pattern", "seconds", *parts, "peak, MiB", "perplexity"]
    scored = sorted({r["perplexity_tokens"] for r in found if r["perplexity"] is not None})
    text = (
        "From directory to directory, each run in a process of its own, peers on the same samples, layers and dtype. "
        "The peak is what the process grew by."
    ) + (f" Perplexity on {listing([str(tokens) for tokens in scored])} tokens." if scored else NOTHING)
    return [text, table(header, rows, left=4), *_against_peers(found), *_settings(found)]


def _against_peers(found: list[Row]) -> list[str]:
    same = ("model", "pattern", "samples", "length", "dtype")
    rows = []
    for peer in (r for r in found if r["engine"] != "thanos"):
        for ours in (r for r in found if r["engine"] == "thanos" and all(r[key] == peer[key] for key in same)):
            if ours["method"] in (peer["method"], "thanos"):
                rows.append(
                    [f"{METHODS[ours['method']]} against {_ENGINES[peer['engine']]}'s {METHODS[peer['method']]}",
                     pattern_name(peer["pattern"]), number(peer["total"] / ours["total"]),
                     number(peer["peak_bytes"] / ours["peak_bytes"] if ours["peak_bytes"] else None),
                     number(ours["perplexity"]), number(peer["perplexity"])]
                )  # fmt: skip
    header = ["pair", "pattern", "times as fast", "peak memory, theirs / ours", "perplexity, ours", "theirs"]
    return ["Side by side:", table(header, rows, left=2)] if rows else []


def _settings(found: list[Row]) -> list[str]:
    """What all runs of a model by an engine share, told once."""
    lines = []
    for model, engine in dict.fromkeys((r["model"], r["engine"]) for r in found):
        told = [
            {"samples": f"{r['samples']} x {r['length']} tokens", "dtype": r["dtype"], **r["settings"]}
            for r in found
            if (r["model"], r["engine"]) == (model, engine)
        ]
        shared = [f"{key}: {text}" for key, text in told[0].items() if all(one.get(key) == text for one in told)]
        lines.append(f"- **{model}, {_ENGINES.get(engine, engine)}**: {'; '.join(shared)}")
    return [folded("Settings", "\n".join(lines))]


def gpus(files: list[list[Row]]) -> list[str]:
    """The tables of each device, or an empty one."""
    command = "`make bench-gpu`"
    header = ["method", "pattern", "shape", "ms", "GE"]
    if not files:
        rows = [[METHODS[method], pattern_name(pattern), *[NOTHING] * 3] for method, pattern in CASES]
        return [f"No GPU time has been measured yet; {command} fills this table.", table(header, rows, left=3)]
    texts = []
    for found in files:
        layers, models = ([r for r in found if r["kind"] == kind] for kind in ("layer", "model"))
        rows = [[*_pruned(r), shape_of(r), number(1000 * r["seconds"]), number(r["ge"])] for r in layers]
        texts += [f"{found[0]['machine']['gpu']}, by {command}. Layers, float32:", table(header, rows, left=3)]
        if models:
            text = "Random models with the widths of LLaMA-3 8B, 32 samples of 2048 tokens, bfloat16:"
            rows = [[*_pruned(r), r["blocks"], number(r["seconds"])] for r in models]
            texts += [text, table(["method", "pattern", "blocks", "seconds"], rows, left=2)]
    return texts


def _pruned(r: Row) -> list[str]:
    return [METHODS[r["method"]], pattern_name(r["pattern"])]
