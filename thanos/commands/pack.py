"""``python -m thanos.pack PRUNED_DIR --output DIR``: write a pruned checkpoint in its compact form (docs/format.md).

The layer types are chosen from the weights themselves. As a function, ``thanos.pack(source, output)`` does the same.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from thanos.commands.cli import TRUST_OPTION, Command
from thanos.compact import VALUES, pack


@click.command(name="python -m thanos.pack", cls=Command)
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--values",
    default=VALUES[0],
    show_default=True,
    type=click.Choice(VALUES),
    help="Keep each value as it is, or round those of pruned layers to int8 with a float16 scale for each 128 columns.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a model.")
@TRUST_OPTION
def main(pruned: Path, output: Path, values: str, overwrite: bool, trust_remote_code: bool) -> None:
    """Write the checkpoint in the directory PRUNED in its compact form."""
    packed = pack(pruned, output, values=values, overwrite=overwrite, trust_remote_code=trust_remote_code)
    counts = Counter(packed.kinds.values())
    fused = counts.pop("fused", 0)
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no linear layers"
    click.echo(f"{summary}: {packed}")
    if fused:
        click.echo(f"{fused} of its tensors hold the projections of several experts at once, and stay dense.")
    click.echo(f"Written to {output}; load it with thanos.load({str(output)!r}).")
