"""``python -m thanos.unpack DIR --output PRUNED_DIR``: restore the ordinary checkpoint of a compact one, bit for bit.

As a function, ``thanos.unpack(folder, output)`` does the same.
"""

from __future__ import annotations

from pathlib import Path

import click

from thanos.commands.cli import Command
from thanos.compact import unpack


@click.command(name="python -m thanos.unpack", cls=Command)
@click.argument("compact", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a model.")
def main(compact: Path, output: Path, overwrite: bool) -> None:
    """Restore the ordinary checkpoint that the directory COMPACT was packed from."""
    unpack(compact, output, overwrite=overwrite)
    click.echo(f"Written to {output}.")
