"""The summary of a run in the terminal: what people want to know first, in eighty columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from thanos.report import numbers
from thanos.report.page import PAGE
from thanos.report.record import ModelReport

WIDTH = 80
_LABEL = 14


def print_summary(report: ModelReport, console: Console, output: Path | None = None) -> None:
    """A few lines: perplexity, size, where to look next.

    Args:
        report: of the run.
        console: where to.
        output: the directory that the model was saved in, if it was.
    """
    for label, value in summary(report, output):
        pieces = _wrapped(value, WIDTH - _LABEL)
        for index, piece in enumerate(pieces):
            head = label if index == 0 else ""
            console.print(f"[bold]{head:{_LABEL}}[/]", end="", highlight=False, soft_wrap=True)
            console.print(piece, highlight=False, markup=False, soft_wrap=True)


def summary(report: ModelReport, output: Path | None = None) -> list[tuple[str, str]]:
    """The lines, each with its label."""
    alpha = report.options.get("outlier_fraction", 0.0)
    refine = report.options.get("refine") or "none"
    extra = (f", outlier fraction {alpha:g}" if alpha else "") + (f", {refine}" if refine != "none" else "")
    lines = [("pruned", f"{report.method}, {report.pattern}{extra}")]
    sparsity = f"{report.effective_sparsity:.2%} of the blocks' weights, {len(report.layers):,} layers"
    if abs(report.effective_sparsity - report.nominal_sparsity) > 5e-5:
        sparsity += f" (nominal {report.nominal_sparsity:.2%})"
    lines.append(("sparsity", sparsity))
    if report.perplexity:
        before, after = report.perplexity["dense"], report.perplexity["pruned"]
        source = Path(str(report.perplexity["source"])).name
        times = numbers.change(before, after)
        lines.append(
            (
                "perplexity",
                f"{numbers.perplexity(before)} dense, {numbers.perplexity(after)} pruned"
                + (f" ({times})" if times else "")
                + f", on {_short(source, 30)}",
            )
        )
    if report.size:
        lines.append(("size", _size(report)))
    lines.append(("time", _time(report)))
    worst = max(report.layers, key=lambda layer: layer.relative_loss, default=None)
    if worst is not None:
        middle = sorted(layer.relative_loss for layer in report.layers)[len(report.layers) // 2]
        lines.append(("relative loss", f"median {middle:.2e}, largest {worst.relative_loss:.2e} in"))
        lines.append(("", _short(worst.name, WIDTH - _LABEL)))
    for reason, count in Counter(report.dense.values()).most_common():
        lines.append(("left dense", f"{count:,}: {reason}"))
    if output is not None:
        lines.append(("look next at", _short(str(output / PAGE), WIDTH - _LABEL)))
    return lines


def _size(report: ModelReport) -> str:
    parts = []
    for name, said in (("parameters", numbers.count), ("bytes", numbers.size)):
        before, after = report.size[name]["before"], report.size[name]["after"]
        if after is None:
            continue
        unit = " parameters" if name == "parameters" else ""
        same = before is None or before == after
        parts.append(f"{said(after)}{unit}" if same else f"{said(before)} -> {said(after)}{unit}")
    zeros = sum(layer.zeros for layer in report.layers)
    if zeros and "became" not in report.options:
        parts.insert(1, f"{numbers.count(zeros)} of them zero")
    return ", ".join(parts)


def _time(report: ModelReport) -> str:
    parts = [f"{name} {numbers.seconds(value)}" for name, value in report.seconds.items() if name != "total" and value]
    return numbers.seconds(report.seconds["total"]) + (f" ({', '.join(parts)})" if parts else "")


def _short(text: str, width: int) -> str:
    """The text without its middle, where it is too long."""
    if len(text) <= width:
        return text
    left = (width - 3) // 2
    return f"{text[:left]}...{text[-(width - 3 - left) :]}"


def _wrapped(text: str, width: int) -> Sequence[str]:
    """Lines of at most that many characters, broken between words."""
    lines = [""]
    for word in text.split(" "):
        word = _short(word, width)
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
