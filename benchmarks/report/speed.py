"""Where the time of one layer goes, and how it grows."""

from __future__ import annotations

from collections import Counter

from benchmarks.ge import fitted_exponent
from benchmarks.report.markdown import NOTHING, folded, listing, number, table, two_decimals
from benchmarks.report.read import Results, Row
from benchmarks.report.rows import METHODS, machines, pattern_name

STEPS = ("factor", "select", "solve", "update", "loss")
PRODUCT = "one dense product (1 GE)"
_FIT_FROM = 1024  # columns; narrower layers fit into the cache
Series = dict[str, list[tuple[int, float]]]


def records(results: Results, suite: str, kind: str, **fields: object) -> list[Row]:
    return results.suites[suite].of(kind, **fields) if suite in results.suites else []


def width_series(results: Results) -> Series:
    """For each method, and for the dense product, (width, seconds)."""
    found = records(results, "scaling", "width")
    series = {
        METHODS[method]: sorted((r["columns"], r["seconds"]) for r in found if r["method"] == method)
        for method in sorted({r["method"] for r in found}, key=list(METHODS)[::-1].index)
    }
    products: dict[int, float] = {}
    for r in found:
        products[r["columns"]] = min(r["ge_seconds"], products.get(r["columns"], r["ge_seconds"]))
    return series | ({PRODUCT: sorted(products.items())} if products else {})


def exponent(points: list[tuple[int, float]], start: int = 0) -> float | None:
    """Of the seconds, fitted from the width ``start`` on; None for less than two widths."""
    kept = [point for point in points if point[0] >= start]
    return fitted_exponent(*zip(*kept, strict=True)) if len(kept) > 1 else None


def growth(results: Results) -> list[str]:
    series = width_series(results)
    if not series:
        return []
    widths = sorted({width for points in series.values() for width, _ in points})
    rows = [
        [name, *(number(dict(points).get(width)) for width in widths), *_exponents(points)]
        for name, points in series.items()
    ]
    pattern = pattern_name(records(results, "scaling", "width")[0]["pattern"])
    text = f"Seconds to prune a square layer of b columns, {pattern}, and the exponent p of seconds ~ bᵖ fitted."
    header = ["b", *map(str, widths), "p, all widths", f"p, from {_FIT_FROM}"]
    claims = []
    for rival in (METHODS["paper"], METHODS["sparsegpt"]):
        shared = dict(series.get(rival, []))
        ours = [(width, seconds) for width, seconds in series.get(METHODS["thanos"], []) if width in shared]
        if ours:
            times = [f"{number(shared[width] / seconds)} at b = {width}" for width, seconds in ours]
            claims.append(f"Seconds of {rival} over those of Thanos: {listing(times)}.")
    return [text, table(header, rows), *claims]


def _exponents(points: list[tuple[int, float]]) -> list[str]:
    return [number(exponent(points)), number(exponent(points, _FIT_FROM))]


def block_time_series(results: Results) -> Series:
    """For each pattern, (block size, GE)."""
    series: Series = {}
    for r in records(results, "scaling", "block_size"):
        series.setdefault(pattern_name(r["pattern"]), []).append((r["block_size"], r["ge"]))
    return {pattern: sorted(points) for pattern, points in series.items()}


def block_time(results: Results) -> list[str]:
    found = records(results, "scaling", "block_size")
    found.sort(key=lambda r: (r["pattern"], r["block_size"]))
    rows = [
        [pattern_name(r["pattern"]), r["block_size"], number(r["seconds"]), number(r["ge"]), *_steps(r)] for r in found
    ]
    shapes = listing(sorted({_shape(r) for r in found}))
    header = ["pattern", "B", "seconds", "GE", *STEPS]
    text = f"Thanos on a layer of {shapes}, by the block size B."
    return [text, folded("The numbers, the steps in GE", table(header, rows))]


def step_bars(results: Results) -> tuple[str, list[tuple[str, dict[str, float]]]]:
    """The shape most often measured (of these the largest), and each method's and pattern's steps there in GE."""
    here = [r for r in _usual_layer(results) if r["steps"] and r["backend"] != "reference"]
    patterns = list(dict.fromkeys(map(_pattern, here)))
    here.sort(key=lambda r: (patterns.index(_pattern(r)), -list(METHODS).index(r["method"])))
    bars = []
    for r in here:
        parts = {step: r["steps"].get(step, 0.0) / r["ge_seconds"] for step in STEPS}
        parts["rest"] = max(0.0, r["ge"] - sum(parts.values()))
        bars.append((f"{METHODS[r['method']]}, {_pattern(r)}", parts))
    return _shape(here[0]) if here else NOTHING, bars


def _usual_layer(results: Results) -> list[Row]:
    """The records of the shape most often measured, of these the largest."""
    found = records(results, "layer", "layer")
    counts = Counter((r["rows"], r["columns"]) for r in found)
    shape = max(counts, key=lambda shape: (counts[shape], shape), default=None)
    return [r for r in found if (r["rows"], r["columns"]) == shape]


def readme_table(results: Results) -> list[str]:
    """GE of each method at each pattern on the layer most often measured, and how they were measured."""
    found = _usual_layer(results)
    if not found:
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
        f"One layer of {_shape(found[0])}, in GE: the time of one dense float32 product of that size just before and "
        f"after, {two_decimals(units[0])} to {two_decimals(units[-1])} s there (`make bench`)."
    )
    machine = machines([results.suites["layer"].machine])
    return [table([f"{_shape(found[0])}, GE", *patterns], rows), " ".join([note, *machine])]


def steps(results: Results) -> list[str]:
    shape, bars = step_bars(results)
    header = ["method, pattern", *STEPS, "rest", "in all"]
    rows = [[name, *map(two_decimals, parts.values()), two_decimals(sum(parts.values()))] for name, parts in bars]
    return [folded(f"The numbers: one layer of {shape}, in GE", table(header, rows))]


def layers(results: Results) -> list[str]:
    found = records(results, "layer", "layer")
    engine = [r for r in found if r["backend"] != "reference"]
    usual = [r for r in engine if r["pattern"] == "0.5"]
    methods = [method for method in METHODS if any(r["method"] == method for r in usual)]
    shapes = dict.fromkeys((r["model"], r["layer"], _shape(r)) for r in usual)
    rows = []
    for shape in shapes:
        here = {r["method"]: r for r in usual if (r["model"], r["layer"], _shape(r)) == shape}
        ratio = here["thanos"]["ratio_to_sparsegpt"] if "thanos" in here else None
        peak = _peak(here["thanos"]) if "thanos" in here else NOTHING
        ge = [number(here[method]["ge"]) if method in here else NOTHING for method in methods]
        rows.append([*shape, *ge, number(ratio), peak])
    columns = [*(METHODS[method] for method in methods), "Thanos / SparseGPT", "peak of Thanos, b² floats"]
    full = [
        [r["model"], r["layer"], _shape(r), METHODS[r["method"]], r["backend"], _pattern(r), number(r["seconds"]),
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
            rows.append([name, _shape(r), _pattern(r), number(r["seconds"]), number(r["ge"]), times])
    header = ["baseline", "shape", "pattern", "seconds", "GE", "times the seconds of Thanos"]
    text = "Against the baselines; a run of Thanos just before each round is what its seconds are compared with:"
    return [text, table(header, rows, left=3)] if rows else []


def _pattern(r: Row) -> str:
    return pattern_name(r["pattern"]) + (f", α = {r['alpha']:g}" if r.get("alpha") else NOTHING)


def _shape(r: Row) -> str:
    return f"{r['rows']} x {r['columns']}"


def _steps(r: Row) -> list[str]:
    return [two_decimals(r["steps"].get(step, 0.0) / r["ge_seconds"]) for step in STEPS]
