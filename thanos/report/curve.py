"""What training did after the pruning, as a page and a card show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from thanos.report import numbers
from thanos.report.figures import Line, Plot, html
from thanos.report.read import Run, as_number

_TRAINED = {
    "weights": "all kept weights, norms and biases",
    "norms": "norms and biases",
    "lora": "low-rank updates of the kept weights, norms and biases",
}


def recoveries(run: Run) -> list[Mapping[str, Any]]:
    """What a record says of training after the pruning, in the order in which it was done."""
    found = run.record.get("recovery")
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def told(recovery: Mapping[str, Any]) -> str:
    """One training, in a sentence."""
    options, text = _part(recovery, "options"), _part(recovery, "text")
    what = _TRAINED.get(str(options.get("train")), str(options.get("train")))
    source = Path(str(text.get("source", ""))).name
    teacher = f", towards the predictions of {Path(str(options['teacher'])).name}" if options.get("teacher") else ""
    mask = f", mask {options['mask']}" if options.get("mask", "fixed") != "fixed" else ""
    return (
        f"Trained afterwards: {what}{mask}, for {numbers.seconds(recovery.get('seconds'))} and "
        f"{numbers.count(recovery.get('tokens'))} tokens" + (f" of {source}" if source else "") + teacher
    )


def before_and_after(recovery: Mapping[str, Any]) -> tuple[float | None, float | None, str]:
    """The perplexities before and after one training, and the name of the text."""
    found = _part(recovery, "perplexity")
    return as_number(found.get("before")), as_number(found.get("after")), Path(str(found.get("source", ""))).name


def recovery_html(run: Run) -> str:
    """Each training with its curve; empty where there was none."""
    return "".join(_one(recovery) for recovery in recoveries(run))


def _one(recovery: Mapping[str, Any]) -> str:
    lines = [told(recovery) + "."]
    before, after, source = before_and_after(recovery)
    if after is not None:
        lines.append(f"Perplexity on {source}: {numbers.perplexity(before)} before, {numbers.perplexity(after)} after.")
    points = [one for one in recovery.get("curve") or [] if isinstance(one, Mapping)]
    best = recovery.get("best")
    lines.append(f"Kept: the weights of step {best}." if best else "Kept: the start; nothing was better.")
    if recovery.get("note"):
        lines.append(f"It ended early: {recovery['note']}.")
    return f"<p>{escape(' '.join(lines))}</p>" + _command(recovery) + _plot(points)


def _command(recovery: Mapping[str, Any]) -> str:
    command = str(recovery.get("command") or "")
    return f'<div class="command"><code>{escape(command)}</code></div>' if command else ""


def _plot(points: Sequence[Mapping[str, Any]]) -> str:
    if len(points) < 2:
        return ""
    plot = Plot(
        "Loss on text held out",
        "Mean loss per token while training; the best is kept.",
        [str(one.get("step")) for one in points],
        "step",
        [Line("held out", [as_number(one.get("held_out")) for one in points])],
    )
    return f'<div class="plots">{html(plot)}</div>'


def _part(recovery: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = recovery.get(name)
    return found if isinstance(found, Mapping) else {}
