"""What the settings change: block size, alpha, mask metric, calibration, and where the outlier rows are."""

from __future__ import annotations

import re
from statistics import mean, median
from typing import Any

from benchmarks.experiments.grid import Run
from benchmarks.report.markdown import NOTHING, number, percent, spread, table
from benchmarks.report.read import Results, Row
from benchmarks.report.rows import Group, groups, pattern_name, provenance

SEEDS_OF = "Perplexity as mean ± standard deviation over the calibration seeds, where there are several"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def block_size_series(results: Results) -> dict[str, list[tuple[int, float, float]]]:
    """For each pattern, (block size, perplexity, seconds of pruning)."""
    series: dict[str, list[tuple[int, float, float]]] = {}
    for group in _groups(results, "block_size"):
        scores = [score for score in group.perplexities if score is not None]
        if scores and group.run.block_size is not None and group.first:
            point = (group.run.block_size, mean(scores), group.first["seconds"]["prune"])
            series.setdefault(pattern_name(group.run.pattern), []).append(point)
    return {pattern: sorted(points) for pattern, points in series.items()}


def block_size_section(results: Results) -> list[str]:
    rows = [
        [pattern_name(g.run.pattern), g.run.block_size, spread(g.perplexities), _prune_seconds(g), number(g.seconds)]
        for g in _groups(results, "block_size")
    ]
    text = "Thanos with blocks of B columns. One seed: the main table has the deviation over several."
    header = ["pattern", "B", "perplexity", "seconds of pruning", "of the whole walk"]
    return [text, table(header, rows), provenance(results.experiments["block_size"])]


def alpha_section(results: Results) -> list[str]:
    rows = [
        [pattern_name(g.run.pattern), f"{g.run.alpha:g}", percent(g.sparsity, 2), spread(g.perplexities),
         number(g.seconds)]
        for g in _groups(results, "alpha")
    ]  # fmt: skip
    text = (
        "Thanos with a share α of the rows of each layer, those with the largest outputs, left untouched. Structured "
        "pruning makes up for them in the other rows; n:m cannot, so its effective sparsity falls with α. "
        f"{SEEDS_OF}; seconds of the first."
    )
    header = ["pattern", "α", "effective sparsity", "perplexity", "seconds"]
    return [text, table(header, rows), provenance(results.experiments["alpha"])]


def metric_section(results: Results) -> list[str]:
    found = _groups(results, "metric")
    patterns = list(dict.fromkeys(group.run.pattern for group in found))
    names = {None: "Wanda's, abs(w)·‖x‖ (the default)", "obs": "OBS, w² / [H⁻¹]ⱼⱼ", "magnitude": "magnitude, abs(w)"}
    rows = []
    for metric in dict.fromkeys(group.run.metric for group in found):
        cells = [[g for g in found if (g.run.metric, g.run.pattern) == (metric, pattern)] for pattern in patterns]
        runs = max(len(group.rows) for cell in cells for group in cell)
        rows.append(
            [names.get(metric, metric), *(spread(cell[0].perplexities) if cell else NOTHING for cell in cells), runs]
        )
    text = f"By what Thanos chooses the weights to remove; the compensation is the same. {SEEDS_OF}."
    header = ["metric", *map(pattern_name, patterns), "runs"]
    return [text, table(header, rows), provenance(results.experiments["metric"])]


def calibration_section(results: Results) -> list[str]:
    found, usual = _groups(results, "calibration"), Run()
    tokens = usual.samples * usual.length

    def part(title: str, column: str, keep: Any, value: Any) -> str:
        kept = sorted((group for group in found if keep(group.run)), key=lambda group: value(group.run))
        rows = [[value(g.run), g.run.samples * g.run.length, spread(g.perplexities), number(g.seconds)] for g in kept]
        return f"{title}\n\n" + table([column, "tokens", "perplexity", "seconds"], rows) if rows else NOTHING

    parts = [
        part(
            f"Number of samples of {usual.length} tokens:",
            "samples",
            lambda run: (run.source, run.length) == (usual.source, usual.length),
            lambda run: run.samples,
        ),
        part(
            f"Length of the samples, {tokens} tokens in all:",
            "length",
            lambda run: run.source == usual.source and run.samples * run.length == tokens,
            lambda run: run.length,
        ),
        part(
            f"Source of {usual.samples} samples of {usual.length} tokens (`wikitext2`: the second half of the test "
            "text, which is not scored):",
            "source",
            lambda run: (run.samples, run.length) == (usual.samples, usual.length),
            lambda run: run.source,
        ),
    ]
    text = f"Thanos at {pattern_name(usual.pattern)}. {SEEDS_OF}; seconds of the first."
    return [text, *filter(None, parts), provenance(results.experiments["calibration"])]


def outlier_map(results: Results) -> dict[str, list[list[float | None]]]:
    """``energy_share`` and ``loss_share`` by decoder block and by :data:`KINDS`."""
    experiment = results.experiments.get("outliers")
    layers = [layer for row in experiment.rows for layer in row["layers"]] if experiment else []
    places = {place: layer for layer in layers if (place := _place(layer))}
    blocks = range(1 + max((block for block, _ in places), default=-1))
    return {
        share: [[places.get((block, kind), {}).get(share) for kind in KINDS] for block in blocks]
        for share in ("energy_share", "loss_share")
        if places
    }


def outliers_section(results: Results) -> list[str]:
    experiment = results.experiments["outliers"]
    layers = [layer for row in experiment.rows for layer in row["layers"]]
    rows = []
    for kind in KINDS:
        of_kind = [layer for layer in layers if layer["name"].endswith(kind)]
        if of_kind:
            most = max(of_kind, key=lambda layer: layer["energy_share"])
            place = _place(most)
            shares = [median(layer[share] for layer in of_kind) for share in ("energy_share", "loss_share")]
            block = f"{percent(most['energy_share'])} in block {place[0]}" if place else most["name"]
            rows.append([kind, f"{of_kind[0]['outliers']} of {of_kind[0]['rows']}", *map(percent, shares), block])
    alphas = {f"{row['run']['alpha']:g}" for row in experiment.rows}
    text = (
        f"The outlier rows of a layer are the α = {', '.join(sorted(alphas))} of its rows with the largest outputs on "
        "the calibration samples. How much of the layer's output energy do they hold, and how much of its loss when "
        "they are pruned with the others (α = 0)? If all rows were alike, both would be α."
    )
    header = ["layer", "outlier rows", "share of the energy, median", "share of the loss, median", "most energy"]
    return [text, table(header, rows), provenance(experiment)]


def _place(layer: Row) -> tuple[int, str] | None:
    found = re.search(r"\.(\d+)\..*?(\w+)$", layer["name"])
    return (int(found[1]), found[2]) if found else None


def _groups(results: Results, name: str) -> list[Group]:
    experiment = results.experiments.get(name)
    return groups(experiment) if experiment else []


def _prune_seconds(group: Group) -> str:
    return number((group.first.get("seconds") or {}).get("prune"))
