"""``python -m benchmarks.picture``: draw the picture of the documentation's first page, docs/pictures/front.html.

Above is a corner of a real layer of SmolLM2-135M-Instruct, pruned here; the bars are drawn from the records of ``python
-m benchmarks.experiments main``.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

import thanos
from benchmarks.experiments.run import Run
from benchmarks.records import Records
from benchmarks.report.groups import METHODS, Group, groups, pattern_name
from benchmarks.report.markdown import number
from benchmarks.report.read import load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pictures" / "front.html"
LAYER = "model.layers.8.mlp.gate_proj"
PATTERN = "2:4"
ROWS, COLUMNS, CELL = 12, 20, 16
PATTERNS = ("0.5", "2:4")


def layer_problem(name: str) -> tuple[Tensor, Tensor]:
    """The weight of a layer of SmolLM2 and the Hessian of its inputs, over 8 x 512 tokens of Python's documentation."""
    from benchmarks.smollm2 import load_smollm2

    model, tokenizer = load_smollm2(torch.float32)
    layer = model.get_submodule(name)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        model(thanos.load_samples("builtin", tokenizer, 8, 512).tokens)
    inputs = torch.cat(seen)
    return layer.weight.detach(), inputs.T @ inputs / len(inputs)


def grid(values: Tensor, kept: Tensor, scale: float, label: str) -> str:
    """A cell for each number: its sign is the colour, its size the strength; what is not kept is a dot."""
    cells = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            x, y = column * CELL, row * CELL
            if not kept[row, column]:
                cells.append(f'<circle class="gone" cx="{x + CELL / 2:g}" cy="{y + CELL / 2:g}" r="1.5"/>')
                continue
            value = float(values[row, column])
            strength = min(1.0, 0.06 + abs(value) / scale)
            kind = "more" if value > 0 else "less"
            cells.append(f'<rect class="{kind}" x="{x + 1}" y="{y + 1}" opacity="{strength:.2f}"/>')
    box = f"0 0 {COLUMNS * CELL} {ROWS * CELL}"
    return f'<svg class="grid" viewBox="{box}" role="img" aria-label="{label}">{"".join(cells)}</svg>'


def panel(drawing: str, title: str, text: str) -> str:
    return f"<figure>{drawing}<figcaption><b>{title}</b> {text}</figcaption></figure>"


def steps() -> list[str]:
    """The three panels of the layer."""
    weight, hessian = layer_problem(LAYER)
    result = thanos.prune_weight(weight, hessian, PATTERN)
    kept = ~result.mask
    energy = float((weight @ hessian * weight).sum())
    only_removed = -weight * result.mask
    worse = float((only_removed @ hessian * only_removed).sum()) / energy
    change = result.weight - weight
    corner = slice(0, ROWS), slice(0, COLUMNS)
    scale = float(weight[corner].abs().quantile(0.97))
    moved = float(change[corner][kept[corner]].abs().quantile(0.97))
    error = result.loss / energy
    return [
        panel(
            grid(weight[corner], torch.ones_like(kept), scale, "A grid of weights in two colours"),
            "A layer.",
            f"A corner of {LAYER.partition('.')[2]} of SmolLM2-135M: blue above zero, orange below.",
        ),
        panel(
            grid(weight[corner], kept[corner], scale, "The same grid, with two of every four weights gone"),
            "Choose.",
            "Two of every four weights go: those that matter least for what the calibration text sends through them. "
            f"Now {worse:.1%} of the output's energy is wrong.",
        ),
        panel(
            grid(change[corner], kept[corner], moved, "How much each weight that stays has changed"),
            "Make up for it.",
            "Drawn is how far each of the others moves, exactly solved for, to give the layer's output back: "
            f"{error:.1%} is wrong.",
        ),
    ]


def bars(found: Records) -> str:
    """What pruning by each method adds to the loss of a token, for :data:`PATTERNS`."""
    every = groups(found.rows)
    (dense,) = (mean(group) for group in every if group.run.method == "dense")
    worst = max(mean(group) for group in every if group.run.pattern in PATTERNS and plain(group.run))
    lines = [f'<div class="bars"><p>Perplexity on WikiText-2; the model before has {number(dense)}.</p>']
    for pattern in PATTERNS:
        lines.append(f"<p><b>{pattern_name(pattern).capitalize()}</b></p>")
        for group in every:
            if group.run.pattern == pattern and plain(group.run):
                name, score = METHODS[group.run.method], mean(group)
                share = math.log(score / dense) / math.log(worst / dense)
                kind = ' class="ours"' if group.run.method == "thanos" else ""
                bar = f'<i style="width: {55 * share:.1f}%"></i>'
                lines.append(f"<div{kind}><span>{name}</span>{bar}<em>{number(score)}</em></div>")
    lines.append("<p>A bar's length is what pruning adds to the loss of a token.</p></div>")
    return "\n".join(lines)


def plain(run: Run) -> bool:
    """Whether a run differs from the defaults in its method and its pattern alone."""
    return run.method in METHODS and not run.alpha and not run.exclude


def mean(group: Group) -> float:
    values = [value for value in group.values("perplexity") if value is not None]
    return sum(values) / len(values)


def results() -> Records:
    return load(ROOT / "benchmarks" / "results").files["main"]


def main() -> None:
    page = ['<div class="front">', *steps(), "</div>", bars(results())]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
