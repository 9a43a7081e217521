"""``python -m thanos.report DIR [DIR2 ...]``: make the page of a run anew, or compare several."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from thanos.commands.cli import Command, start
from thanos.report.compare import compare_page
from thanos.report.page import PAGE, run_page
from thanos.report.read import read_run


@click.command(cls=Command, context_settings={"max_content_width": 100, "show_default": True})
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where the page goes.  [default: DIR/report.html; of several, comparison.html here]",
)
def main(directories: tuple[Path, ...], output: Path | None) -> None:
    """Write the report of the pruned model in DIR, or of several side by side.

    \b
    Examples:
      python -m thanos.report ./llama-50
      python -m thanos.report ./llama-50 ./llama-24 --output both.html
    """
    runs = [read_run(folder) for folder in directories]
    if len(runs) == 1:
        folder = directories[0] if directories[0].is_dir() else directories[0].parent
        output = output or folder / PAGE
        _write(output, run_page(runs[0]))
    else:
        output = output or Path("comparison.html")
        _write(output, compare_page(runs))
    click.echo(f"wrote {output}")


def _write(file: Path, page: str) -> None:
    """Write the page whole, or leave what was there."""
    if file.is_dir():
        raise ValueError(f"the page cannot be written to {file}, which is a directory; name a file with --output")
    try:
        handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=file.parent)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror or error}; name another file with --output") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(page)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, file)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(
                f"cannot write {file}: {error.strerror or error}; name another file with --output"
            ) from error
        raise


if __name__ == "__main__":
    start(main)
