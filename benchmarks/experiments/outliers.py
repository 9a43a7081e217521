"""Where the outlier rows are: how much of a layer's output and of its loss they carry."""

from __future__ import annotations

import math
import re
from statistics import median

import torch

import thanos_kernels as kernels
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.lab import Lab
from benchmarks.experiments.run import Run
from benchmarks.records import Records, Row
from benchmarks.report.markdown import percent, table
from thanos import prune_weight
from thanos.walk.decoder import Layer, find_decoder
from thanos.walk.hessians import Collector

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARES = ("energy_share", "loss_share")


def measure(lab: Lab, run: Run, zero_shot: bool) -> list[Row]:
    """For each linear layer of the dense model, the shares of its ``ceil(alpha c)`` outlier rows.

    ``energy_share`` is of the output energy ``tr(W H W.T)``, ``loss_share`` of the layer loss at alpha = 0.
    """
    layers = [layer for block in find_decoder(lab.model).layers for layer in block]
    collector = Collector("auto")

    with torch.no_grad(), collector.watching(layers, collector.add):
        for batch in lab.samples(run).split(8):
            lab.model(batch, use_cache=False)
    return [_shares(layer, collector, run) for layer in layers]


def _shares(layer: Layer, collector: Collector, run: Run) -> Row:
    inputs = collector.take(layer)
    assert inputs is not None, f"no token reached {layer.name}"
    assert inputs.hessian is not None
    weight = layer.weight.float()
    pruned = prune_weight(weight, inputs.hessian, str(run.pattern))
    energy = kernels.row_energy(weight, inputs.hessian).double()
    loss = kernels.row_energy(pruned.weight - weight, inputs.hessian).double()
    outliers = energy.argsort(descending=True)[: math.ceil(run.alpha * len(energy))]
    return {
        "name": layer.name,
        "rows": len(energy),
        "outliers": len(outliers),
        "energy_share": round(float(energy[outliers].sum() / energy.sum()), 5),
        "loss_share": round(float(loss[outliers].sum() / loss.sum()), 5),
        "relative_loss": round(float(loss.sum() / energy.sum()), 6),
    }


def shares(rows: list[Row]) -> dict[str, list[list[float | None]]]:
    """``energy_share`` and ``loss_share`` by decoder block and by :data:`KINDS`."""
    places = {place: row for row in rows if (place := _place(row))}
    blocks = range(1 + max((block for block, _ in places), default=-1))
    return {
        share: [[places.get((block, kind), {}).get(share) for kind in KINDS] for block in blocks]
        for share in SHARES
        if places
    }


def _place(row: Row) -> tuple[int, str] | None:
    found = re.search(r"\.(\d+)\..*?(\w+)$", row["name"])
    return (int(found[1]), found[2]) if found else None


def section(found: Records) -> list[str]:
    rows = []
    for kind in KINDS:
        if of_kind := [row for row in found.rows if row["name"].endswith(kind)]:
            most = max(of_kind, key=lambda row: row["energy_share"])
            place = _place(most)
            medians = [median(row[share] for row in of_kind) for share in SHARES]
            where = f"{percent(most['energy_share'])} in block {place[0]}" if place else most["name"]
            rows.append([kind, f"{of_kind[0]['outliers']} of {of_kind[0]['rows']}", *map(percent, medians), where])
    alphas = {f"{Run(**row['run']).alpha:g}" for row in found.rows}
    text = (
        f"The outlier rows of a layer are the α = {', '.join(sorted(alphas))} of its rows with the largest outputs on "
        "the calibration samples. How much of the layer's output energy do they hold, and how much of its loss when "
        "they are pruned with the others (α = 0)? If all rows were alike, both would be α."
    )
    header = ["layer", "outlier rows", "share of the energy, median", "share of the loss, median", "most energy"]
    return [text, table(header, rows)]


EXPERIMENT = Experiment(
    [Run(pattern="structured:0.3", alpha=0.1)],
    {"Where are the outlier rows?": section},
    picture="outliers",
    measure=measure,
)
