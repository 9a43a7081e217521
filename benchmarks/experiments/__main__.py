"""``python -m benchmarks.experiments NAME``: run one experiment, or go on with an interrupted one."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks import peers
from benchmarks.experiments.lab import WINDOW, Settings, start_worker, work
from benchmarks.experiments.registry import EXPERIMENTS
from benchmarks.experiments.store import Store
from benchmarks.smollm2 import fast_dtype, model_file
from thanos.checkpoint import DTYPES
from thanos.scoring.zeroshot import load_tasks

_ROOT = Path(__file__).parents[2]
_DTYPE = str(fast_dtype()).removeprefix("torch.")
_DATA = _ROOT.parent / "shared" / "data"
_PATH = click.Path(path_type=Path)
_MANY = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.argument("name", type=click.Choice(list(EXPERIMENTS)))
@click.option("--calibration", type=_PATH, default=_DATA / "c4-sample.jsonl", help="A C4 text.")
@click.option("--evaluate", "evaluation", type=_PATH, default=_DATA / "wikitext2-test.txt", help="WikiText-2.")
@click.option("--windows", type=_MANY, default=8, help=f"Of {WINDOW} tokens each, for the perplexity.")
@click.option("--tasks-data", "tasks", type=_PATH, default=_DATA / "zeroshot", help="For lm-eval, JSONL.")
@click.option("--limit", type=_MANY, default=50, help="Documents of each zero-shot task, in the main table.")
@click.option("--zero-shot/--no-zero-shot", default=True, help="Score the main table's first seed with lm-eval.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=_DTYPE, help="Of the model.")
@click.option("--workers", type=_MANY, default=1, help="Runs at a time; they share the cores.")
@click.option("--output", type=_PATH, default=_ROOT / "benchmarks" / "results", help="A folder.")
def main(name: str, zero_shot: bool, workers: int, output: Path, **options: Any) -> None:
    """Run the experiment NAME; runs that its results hold already are not repeated."""
    experiment, settings = EXPERIMENTS[name], Settings(**options)
    for file in (settings.calibration, settings.evaluation):
        if not file.is_file():
            raise click.ClickException(f"there is no file {os.path.relpath(file)}: pass --calibration and --evaluate")
    scored = experiment.zero_shot and zero_shot
    command = f"python -m benchmarks.experiments {name}" + (f" --workers {workers}" if workers > 1 else "")
    try:
        model_file()
        if scored:
            load_tasks(data=settings.tasks)
        store = Store(output, name, command, settings.to_dict())
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    store.add([])
    missing = store.missing(scored)
    click.echo(f"{name}: {len(experiment.runs) - len(missing)} of {len(experiment.runs)} runs are there")
    if (why := peers.missing()) and (left := [run for run in missing if run.engine == "llmcompressor"]):
        click.echo(f"{len(left)} runs by llm-compressor are left out: {why}")
        missing = [run for run in missing if run not in left]
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (settings, threads)) as pool:
        jobs = [pool.submit(work, experiment.measure, run, scored and run.seed == 0) for run in missing]
        for done, job in enumerate(as_completed(jobs), 1):
            rows = job.result()
            store.add(rows)
            told, score = rows[0]["run"], rows[0].get("perplexity")
            click.echo(f"[{done}/{len(missing)}, {time.perf_counter() - begin:.0f} s] {told}: {score}")


if __name__ == "__main__":
    main()
