"""Where the time of one layer goes, and how it grows."""

from __future__ import annotations

from collections import Counter

from benchmarks.ge import FIT_FROM, fitted_exponent
from benchmarks.machine import sentences
from benchmarks.records import Row
from benchmarks.report.groups import METHODS, pattern_name
from benchmarks.report.markdown import NOTHING, folded, listing, number, percent, table, two_decimals

STEPS = ("factor", "select", "solve", "update", "loss")
PRODUCT = "one dense product (1 GE)"
Series = dict[str, list[tuple[int, float]]]


def width_series(found: list[Row]) -> Series:
    """For each method, and for the dense product, (width, seconds)."""
    series: Series = {}
    for method in sorted({r["method"] for r in found}, key=list(METHODS)[::-1].index):
        series[METHODS[method]] = sorted((r["columns"], r["seconds"]) for r in found if r["method"] == method)
    products: dict[int, float] = {}
    for r in found:
        products[r["columns"]] = min(r["ge_seconds"], products.get(r["columns"], r["ge_seconds"]))
    return series | ({PRODUCT: sorted(products.items())} if products else {})


def exponent(points: list[tuple[int, float]], start: int = 0) -> float | None:
    """Of the seconds, fitted from the width ``start`` on; None for less than two widths."""
    kept = [point for point in points if point[0] >= start]
    return fitted_exponent(*zip(*kept, strict=True)) if len(kept) > 1 else None


def growth(found: list[Row]) -> list[str]:
    series = width_series(found)
    widths = sorted({width for points in series.values() for width, _ in points})
    rows = [
        [name, *(number(dict(points).get(width)) for width in widths),
         number(exponent(points)), number(exponent(points, FIT_FROM))]
        for name, points in series.items()
    ]  # fmt: skip
    pattern = pattern_name(found[0]["pattern"])
    text = f"Seconds to prune a square layer of b columns, {pattern}, and the exponent p of seconds ~ bᵖ fitted."
    header = ["b", *map(str, widths), "p, all widths", f"p, from {FIT_FROM}"]
    claims = []
    for rival in (METHODS["paper"], METHODS["sparsegpt"]):
        shared = dict(series.get(rival, []))
        ours = [(width, seconds) for width, seconds in series.get(METHODS["thanos"], []) if width in shared]
        if ours:
            times = [f"{number(shared[width] / seconds)} at b = {width}" for width, seconds in ours]
            claims.append(f"Seconds of {rival} over those of Thanos: {listing(times)}.")
    return [text, table(header, rows), *claims]


def block_time_series(found: list[Row]) -> Series:
    """For each pattern, (block size, GE)."""
    series: Series = {}
    for r in found:
        series.setdefault(pattern_name(r["pattern"]), []).append((r["block_size"], r["ge"]))
    return {pattern: sorted(points) for pattern, points in series.items()}


def block_time(found: list[Row]) -> list[str]:
    found = sorted(found, key=lambda r: (r["pattern"], r["block_size"]))
    rows = [
        [pattern_name(r["pattern"]), r["block_size"], number(r["seconds"]), number(r["ge"]),
         *(two_decimals(r["steps"].get(step, 0.0) / r["ge_seconds"]) for step in STEPS)]
        for r in found
    ]  # fmt: skip
    shapes = listing(sorted({shape_of(r) for r in found}))
    header = ["pattern", "B", "seconds", "GE", *STEPS]
    text = f"Thanos on a layer of {shapes}, by the block size B."
    return [text, folded("The numbers, the steps in GE", table(header, rows))]


def step_bars(found: list[Row]) -> list[tuple[str, dict[str, float]]]:
    """Each method's and pattern's steps on the usual layer, in GE."""
    here = [r for r in usual_layer(found) if r["steps"] and r["backend"] != "reference"]
    patterns = list(dict.fromkeys(map(_pattern, here)))
    here.sort(key=lambda r: (patterns.index(_pattern(r)), -list(METHODS).index(r["method"])))
    bars = []
    for r in here:
        parts = {step: r["steps"].get(step, 0.0) / r["ge_seconds"] for step in STEPS}
        parts["rest"] = max(0.0, r["ge"] - sum(parts.values()))
        bars.append((f"{METHODS[r['method']]}, {_pattern(r)}", parts))
    return bars


def usual_layer(found: list[Row]) -> list[Row]:
    """The records of the shape most often measured, of these the largest."""
    counts = Counter((r["rows"], r["columns"]) for r in found)
    shape = max(counts, key=lambda shape: (counts[shape], shape), default=None)
    return [r for r in found if (r["rows"], r["columns"]) == shape]


def readme_table(found: list[Row]) -> list[str]:
    """GE of each method at each pattern on the usual layer, and how they were measured."""
    if not (found := usual_layer(found)):
        return []
    patterns = list(dict.fromkeys(map(_pattern, found)))
    methods = dict.fromkeys((method, r["backend"]) for method in METHODS for r in found[::-1] if r["method"] == method)
    rows = []
    for method, backend in reversed(methods):
        here = {_pattern(r): r["ge"] for r in found if (r["method"], r["backend"]) == (method, backend)}
        name = METHODS[method] + (", in plain PyTorch" if (method, backend) == ("sparsegpt", "reference") else NOTHING)
        rows.append([name, *(number(here.get(pattern)) for pattern in patterns)])
    units = sorted(r["ge_seconds"] for r in found)
    note = (
        f"One layer of {shape_of(found[0])}, in GE: the time of one dense float32 product of that size just before and "
        f"after, {two_decimals(units[0])} to {two_decimals(units[-1])} s there (`make bench`)."
    )
    return [table([f"{shape_of(found[0])}, GE", *patterns], rows), " ".join([note, *sentences(found)])]


def steps(found: list[Row]) -> list[str]:
    header = ["method, pattern", *STEPS, "rest", "in all"]
    rows = [
        [name, *map(two_decimals, parts.values()), two_decimals(sum(parts.values()))]
        for name, parts in step_bars(found)
    ]
    return [folded(f"The numbers: one layer of {shape_of(usual_layer(found)[0])}, in GE", table(header, rows))]


def stages(found: list[Row]) -> list[str]:
    rows = [
        [_STAGES[r["stage"]], shape_of(r), _pattern(r), number(r["seconds"]), number(r["ge"]), number(r["limit_ge"]),
         percent(r["loss_left"])]
        for r in found
    ]  # fmt: skip
    header = ["stage", "shape", "pattern", "seconds", "GE", "to reach", "loss left"]
    text = "What follows Thanos with blocks of 128 columns, beyond the pruning itself, and the share of its loss left."
    return [text, table(header, rows, left=3)]


_STAGES = {"refit": "refit", "search": "mask search and refit"}


def layers(found: list[Row]) -> list[str]:
    engine = [r for r in found if r["backend"] != "reference"]
    usual = [r for r in engine if r["pattern"] == "0.5"]
    methods = [method for method in METHODS if any(r["method"] == method for r in usual)]
    shapes = dict.fromkeys((r["model"], r["layer"], shape_of(r)) for r in usual)
    rows = []
    for shape in shapes:
        here = {r["method"]: r for r in usual if (r["model"], r["layer"], shape_of(r)) == shape}
        ratio = here["thanos"]["ratio_to_sparsegpt"] if "thanos" in here else None
        peak = _peak(here["thanos"]) if "thanos" in here else NOTHING
        ge = [number(here[method]["ge"]) if method in here else NOTHING for method in methods]
        rows.append([*shape, *ge, number(ratio), peak])
    columns = [*(METHODS[method] for method in methods), "Thanos / SparseGPT", "peak of Thanos, b² floats"]
    full = [
        [r["model"], r["layer"], shape_of(r), METHODS[r["method"]], r["backend"], _pattern(r), number(r["seconds"]),
         number(r["ge"]), number(r["limit_ge"]), number(r["ratio_to_sparsegpt"]), _peak(r)]
        for r in found
    ]  # fmt: skip
    names = ["model", "layer", "shape", "method", "backend", "pattern"]
    numbers = ["seconds", "GE", "to reach", "/ SparseGPT", "peak, b² floats"]
    return [
        "Unstructured 50%, in GE. The peak is what the process grew by; it is left out where what it held already "
        "was enough.",
        table(["model", "layer", "shape", *columns], rows, left=3),
        *_baselines(found),
        folded(f"Every layer, method and pattern ({len(full)} rows)", table([*names, *numbers], full, left=6)),
    ]


def _peak(record: Row) -> str:
    """In b^2 floats. A result alone has c b: what is less was not seen."""
    floats = record["peak_floats"]
    seen = floats >= record["rows"] * record["columns"]
    return number(floats / record["columns"] ** 2) if seen else NOTHING


def _baselines(found: list[Row]) -> list[str]:
    """Thanos beside SparseGPT by the reference operations and the paper's algorithm."""
    rows = []
    for r in found:
        if r["method"] == "paper" or (r["method"], r["backend"]) == ("sparsegpt", "reference"):
            name = METHODS[r["method"]] + (" by the reference operations" if r["method"] == "sparsegpt" else NOTHING)
            times = number(r.get("times_of_rival"))
            rows.append([name, shape_of(r), _pattern(r), number(r["seconds"]), number(r["ge"]), times])
    header = ["baseline", "shape", "pattern", "seconds", "GE", "times the seconds of Thanos"]
    text = "Against the baselines; a run of Thanos just before each round is what its seconds are compared with:"
    return [text, table(header, rows, left=3)] if rows else []


def _pattern(r: Row) -> str:
    return pattern_name(r["pattern"]) + (f", α = {r['alpha']:g}" if r.get("alpha") else NOTHING)


def shape_of(r: Row) -> str:
    return f"{r['rows']} x {r['columns']}"
