"""``python -m benchmarks.report``: write docs/results.md and its plots, and the README's table."""

from __future__ import annotations

from os.path import relpath
from pathlib import Path

import click

from benchmarks.report.page import drawn, page, readme
from benchmarks.report.read import Results, load

_ROOT = Path(__file__).parents[2]
_FILE = click.Path(dir_okay=False, path_type=Path)


def _link(path: Path, page: Path) -> str:
    """A link to ``path`` from a page."""
    return Path(relpath(path, page.parent)).as_posix()


def _draw(results: Results, folder: Path) -> None:
    try:
        from benchmarks.report.plots import draw
    except ImportError as error:
        raise click.ClickException(f"the plots need matplotlib ({error}): pip install '.[report]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in drawn(results).items():
        draw(name, rows, folder / f"{name}.png")


@click.command(context_settings={"show_default": True})
@click.option("--results", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path),
              default=_ROOT / "benchmarks" / "results", show_default="benchmarks/results",
              help="The JSON lines.")  # fmt: skip
@click.option("--output", type=_FILE, default=_ROOT / "docs" / "results.md", show_default="docs/results.md",
              help="The page; its plots go to the folder plots beside it.")  # fmt: skip
@click.option("--readme", "front", type=_FILE, default=_ROOT / "README.md", show_default="README.md",
              help="Gets the main table between its markers, if it has them.")  # fmt: skip
@click.option("--check", is_flag=True, help="Write nothing; fail where the page or the README would change.")
def main(folder: Path, output: Path, front: Path, check: bool) -> None:
    """Turn the JSON of the benchmarks into the results page."""
    try:
        results = load(folder)
        texts = {output: page(results, _link(output.parent / "plots", output))}
        if front.exists():
            texts[front] = readme(front.read_text(encoding="utf-8"), results, _link(output, front))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        if stale:
            names = " and ".join(relpath(path) for path in stale)
            raise click.ClickException(f"{names} would change: run python -m benchmarks.report")
        return
    _draw(results, output.parent / "plots")
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path], encoding="utf-8")
    click.echo(f"{relpath(output)} is written, with {len(drawn(results))} plots")


if __name__ == "__main__":
    main()
