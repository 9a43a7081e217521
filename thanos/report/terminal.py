"""The summary of a run in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from thanos.report.record import ModelReport


def print_summary(report: ModelReport, console: Console) -> None:
    """A few lines: sparsity, losses, time, perplexity."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    sparsity = f"{report.effective_sparsity:.2%} of {len(report.layers)} layers"
    if abs(report.effective_sparsity - report.nominal_sparsity) > 5e-5:
        sparsity += f" (nominal {report.nominal_sparsity:.2%})"
    alpha = report.options.get("outlier_fraction", 0.0)
    table.add_row("pruned", f"{report.method}, {report.pattern}" + (f", outlier fraction {alpha:g}" if alpha else ""))
    table.add_row("sparsity", sparsity)
    if report.layers:
        losses = sorted(layer.relative_loss for layer in report.layers)
        worst = max(report.layers, key=lambda layer: layer.relative_loss)
        table.add_row("relative loss", f"median {losses[len(losses) // 2]:.2e}, worst {losses[-1]:.2e} in {worst.name}")
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items() if name != "total")
    table.add_row("seconds", f"{report.seconds['total']:.1f} ({parts})")
    if report.perplexity:
        before, after = report.perplexity["dense"], report.perplexity["pruned"]
        table.add_row("perplexity", f"{before:.2f} dense, {after:.2f} pruned ({report.perplexity['source']})")
    console.print(table)
    for name, reason in report.dense.items():
        console.print(f"[yellow]left dense:[/] {name} ({reason})", highlight=False)
