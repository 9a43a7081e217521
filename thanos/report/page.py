"""``report.html``: a run, or several side by side, as one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from thanos.report import numbers
from thanos.report.curve import before_and_after, recoveries, recovery_html
from thanos.report.depth import depth_plots
from thanos.report.figures import bars
from thanos.report.read import Run, as_number
from thanos.report.table import layer_table

PAGE = "report.html"
_SHOWN = {
    "layers",
    "options",
    "seconds",
    "calibration",
    "perplexity",
    "versions",
    "dense",
    "excluded",
    "size",
    "command",
    "recovery",
}
_LONGEST = 200  # names in a list on the page; the record has the rest


def run_page(run: Run) -> str:
    """The page of one run."""
    parts = [
        f"<header><p class='kind'>Pruning report</p><h1>{escape(_title(run))}</h1><p class='what'>{what(run)}</p>"
        f"{_command(run)}</header>",
        f'<section class="tiles">{"".join(_tiles(run))}</section>',
        _section("Where to look next", _look_next(run)),
        _section("Recovery", recovery_html(run)),
        _section("Over depth", f'<div class="plots">{"".join(depth_plots(run))}</div>' if run.layers else ""),
        _section("Time", f'<div class="plots">{_times(run)}</div>' if run.part("seconds") else ""),
        _section("Layers", layer_table([run])),
        _section("Not pruned", _left(run)),
        _section("Load it", _load(run)),
        _section("How it was made", _facts(run)),
    ]
    return document(f"{_title(run)} – pruning report", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page around its parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + '\n</main>\n<div id="tip" role="status" hidden></div>\n'
        + f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


@cache
def _asset(name: str) -> str:
    return files("thanos.report").joinpath("assets", name).read_text(encoding="utf-8")


def write_page(run: Run, file: Path) -> None:
    """Write the page of one run."""
    file.write_text(run_page(run), encoding="utf-8")


def _title(run: Run) -> str:
    return Path(run.model).name.removesuffix(".gguf") or run.title


def what(run: Run) -> str:
    """What was done, in a sentence, as HTML."""
    method, pattern = run.text("method"), run.text("pattern")
    if not method and not pattern:
        return "The record does not say how this model was made."
    model = f"<b>{escape(_name(run.model))}</b>" if run.model else "A model"
    effective = run.number("effective_sparsity")
    layers = f"{len(run.layers):,} layer{'s' * (len(run.layers) != 1)}"
    if run.options.get("became"):
        sentence = f"{model} was made smaller: {escape('; '.join(map(str, run.options['became'])))}."
    else:
        sentence = f"{model} was pruned by <b>{escape(method)}</b> to the pattern <b>{escape(pattern)}</b> in {layers}"
        extra = [f"{key.replace('_', ' ')} {value}" for key, value in _unusual(run)]
        sentence += (f" ({escape(', '.join(extra))})" if extra else "") + "."
    if effective is not None:
        sentence += f" Of the weights in its blocks, <b>{numbers.share(effective)}</b> are gone."
    samples = run.part("calibration")
    if samples.get("samples") and samples.get("source"):
        sentence += (
            f" Calibrated on {escape(str(samples['samples']))} samples of "
            f"{escape(str(samples.get('length', samples.get('sequence_length', '?'))))} tokens of "
            f"{escape(_name(str(samples['source'])))}."
        )
    return sentence


def _name(source: str) -> str:
    """A path's last part; a name on the hub as it is. The facts below say it whole."""
    return Path(source).name if source.count("/") > 1 or source.startswith((".", "~", "/")) else source


def _unusual(run: Run) -> list[tuple[str, Any]]:
    """Options that change what comes out and are not as by default."""
    usual = {"refine": "none", "outlier_fraction": 0.0, "metric": None, "exclude": None, "experts": "routed"}
    return [(key, run.options[key]) for key, value in usual.items() if run.options.get(key, value) != value]


def _command(run: Run) -> str:
    command = run.text("command")
    if not command:
        return ""
    return f'<div class="command"><code>{escape(command)}</code><button type="button" data-copy>Copy</button></div>'


def _tiles(run: Run) -> list[str]:
    """Before and after, in large figures."""
    tiles = []
    before, after = run.number("perplexity", "dense"), run.number("perplexity", "pruned")
    if run.part("perplexity"):
        source = str(run.part("perplexity").get("source", ""))
        note = " ".join(filter(None, [numbers.change(before, after), f"on {Path(source).name}" if source else ""]))
        tiles.append(_tile("Perplexity", numbers.perplexity(after), f"from {numbers.perplexity(before)}", note))
    for recovery in recoveries(run)[-1:]:
        before, after, source = before_and_after(recovery)
        if after is not None:
            title, note = "Perplexity, trained", f"{numbers.change(before, after)} on {source}".strip()
            tiles.append(_tile(title, numbers.perplexity(after), f"from {numbers.perplexity(before)}", note))
    effective, nominal = run.number("effective_sparsity"), run.number("nominal_sparsity")
    if effective is not None or nominal is not None:
        note = "as asked for" if nominal is None else f"{numbers.share(nominal)} nominal"
        tiles.append(_tile("Effective sparsity", numbers.share(effective), note, "of all weights in the blocks"))
    size = {name: (run.part("size").get(name) or {}) for name in ("parameters", "bytes")}
    if as_number(size["parameters"].get("after")) is not None:
        zeros = sum(int(as_number(layer.get("zeros")) or 0) for layer in run.layers)
        gone = run.options.get("became")
        was = size["parameters"].get("before")
        note = f"from {numbers.count(was)}" if gone or not zeros else f"{numbers.count(zeros)} of them zero"
        tiles.append(_tile("Parameters", numbers.count(size["parameters"]["after"]), note, "embeddings included"))
    if as_number(size["bytes"].get("after")) is not None:
        was = numbers.size(size["bytes"].get("before"))
        tiles.append(_tile("Weights on disk", numbers.size(size["bytes"]["after"]), f"from {was}", "as saved here"))
    total = run.number("seconds", "total")
    if total is not None:
        machine = run.options.get("device")
        tiles.append(
            _tile("Time", numbers.seconds(total), f"on {machine}" if machine else "", "reading and writing not counted")
        )
    return tiles


def _tile(name: str, value: str, first: str, second: str) -> str:
    return (
        f'<div class="tile"><h2>{escape(name)}</h2><p class="value">{escape(value)}</p>'
        f"<p>{escape(first)}</p><p>{escape(second)}</p></div>"
    )


def _look_next(run: Run) -> str:
    """What deserves a second look."""
    hints = []
    if run.worst:
        worst = run.worst[0]
        middle = run.worst[(len(run.worst) - 1) // 2]
        hints.append(
            f"The output of <code>{escape(worst['name'])}</code> suffers most: relative loss "
            f"<b>{numbers.small(worst['relative_loss'])}</b>, where the middle layer has "
            f"{numbers.small(middle['relative_loss'])}. <code>--exclude</code> leaves layers dense."
        )
    if run.raised:
        several = len(run.raised) > 1
        hints.append(
            f"The damping was raised in <b>{len(run.raised):,}</b> layer{'s' * several}, first in "
            f"<code>{escape(run.raised[0]['name'])}</code>: too few samples for so many columns, or columns "
            "that depend on each other. More <code>--samples</code> help."
        )
    starved = [
        layer
        for layer, place in zip(run.layers, run.places, strict=True)
        if place.expert is not None and (as_number(layer.get("pool_share")) or 0.0) > 0.5
    ]
    if starved:
        hints.append(
            f"<b>{len(starved):,}</b> layers of experts took more than half of what they know from the tokens of other "
            f"experts, for instance <code>{escape(starved[0]['name'])}</code>: few calibration tokens reached them."
        )
    counted = [run.outliers(layer) for layer in run.layers]
    if outliers := sum(filter(None, counted)):
        rows = sum(int(layer["shape"][0]) for layer in run.layers if layer.get("shape"))
        hints.append(f"<b>{outliers:,}</b> of {rows:,} rows were left untouched as outlier rows.")
    before, after = run.number("perplexity", "dense"), run.number("perplexity", "pruned")
    if before is None and run.layers:
        hints.append("No perplexity was measured: <code>--evaluate TEXT</code> measures it before and after.")
    elif before is not None and after is None and run.part("perplexity"):
        hints.append("The perplexity of the pruned model is no number: it overflows, and is of no use as it is.")
    return f'<ul class="hints">{"".join(f"<li>{hint}</li>" for hint in hints)}</ul>' if hints else ""


def _times(run: Run) -> str:
    total = run.number("seconds", "total") or 0.0
    walk = [(name, as_number(value) or 0.0) for name, value in run.part("seconds").items() if name != "total"]
    steps: dict[str, float] = {}
    for layer in run.layers:
        for name, value in (layer.get("seconds") or {}).items():
            steps[name] = steps.get(name, 0.0) + (as_number(value) or 0.0)
    return bars("The walk", "Seconds of the whole run.", _timed(walk, total)) + bars(
        "In the layers",
        "Seconds by step, summed over the layers.",
        _timed(sorted(steps.items(), key=lambda step: -step[1]), sum(steps.values())),
    )


def _timed(parts: Sequence[tuple[str, float]], total: float) -> list[tuple[str, float, str]]:
    return [
        (name, value, f"{numbers.seconds(value)}, {value / total:.0%}" if total else numbers.seconds(value))
        for name, value in parts
        if value >= 0.0005
    ]


def _left(run: Run) -> str:
    """The layers that stay dense, with the reasons."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in run.part("dense").items():
        by_reason.setdefault(str(reason), []).append(name)
    if run.record.get("excluded"):
        by_reason["excluded by --exclude"] = [str(name) for name in run.record["excluded"]]
    inside = []
    for reason, names in by_reason.items():
        listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in names[:_LONGEST])
        rest = f"<li>and {len(names) - _LONGEST:,} more, in pruning.json</li>" if len(names) > _LONGEST else ""
        inside.append(f"<details><summary>{len(names):,}: {escape(reason)}</summary><ul>{listed}{rest}</ul></details>")
    return "".join(inside)


def _load(run: Run) -> str:
    if run.text("pattern").find("@") > 0:
        code = "import thanos\n\nmodel = thanos.load(DIR)  # chooses the blocks by the prompt"
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(DIR, dtype="auto")\n'
            "tokenizer = AutoTokenizer.from_pretrained(DIR)"
        )
    return (
        f"<pre><code>{escape(code)}</code></pre><p>DIR is the directory that holds this page. To make it again: "
        "<code>python -m thanos.prune --recipe DIR/recipe.yaml --output NEW</code>. Smaller and faster: "
        "<code>python -m thanos.pack DIR --output COMPACT</code>. Where DIR holds a compact.json it is that already, "
        "and <code>thanos.load(DIR)</code> loads it.</p>"
    )


def _facts(run: Run) -> str:
    """Every other fact of the record, whatever it holds."""
    groups = {
        "Options": {**{key: run.record[key] for key in ("method", "pattern") if key in run.record}, **run.options},
        "Calibration": run.part("calibration"),
        "Perplexity": run.part("perplexity"),
        "Versions": run.part("versions"),
        "Other": {key: value for key, value in run.record.items() if key not in _SHOWN},
    }
    return "".join(
        f'<details{" open" if name == "Options" else ""}><summary>{name}</summary><dl class="facts">'
        + "".join(f"<div><dt>{escape(str(key))}</dt><dd>{fact(value)}</dd></div>" for key, value in group.items())
        + "</dl></details>"
        for name, group in groups.items()
        if group
    )


def fact(value: Any) -> str:
    """A value of the record as HTML."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping | list | tuple):
        text = json.dumps(value, ensure_ascii=False)
        return f"<code>{escape(text if len(text) < 2000 else text[:2000] + ' …')}</code>"
    return escape(str(value))


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""
