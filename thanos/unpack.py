"""``python -m thanos.unpack DIR --output PRUNED_DIR``: restore the ordinary checkpoint of a compact one, bit for bit.

As a function, ``thanos.unpack(folder, output)`` does the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from thanos.commands.cli import Command, start
from thanos.compact import unpack

__all__ = ["unpack"]


@click.command(name="python -m thanos.unpack", cls=Command)
@click.argument("compact", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it holds a model.")
def main(compact: Path, output: Path, overwrite: bool) -> None:
    """Restore the ordinary checkpoint that the directory COMPACT was packed from."""
    unpack(compact, output, overwrite=overwrite)
    click.echo(f"Written to {output}.")


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> None:
        unpack(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    start(main)
