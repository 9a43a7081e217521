"""What ``thanos.prune`` does to a model once all that is cheap to refuse was checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thanos.engine.peers import ALONE, Peers
from thanos.options import WalkOptions
from thanos.pattern import Shrink


@dataclass(frozen=True)
class SmallerModel:
    """How a model is made smaller: the arguments of :func:`thanos.shrink_model`, and the preset some came from."""

    pattern: Shrink
    importance: str
    multiple: int
    batch_size: int | None
    backend: str
    device: Any
    damping: float = 0.01
    correction: float = 0.0
    reconstruct: int = 0
    quality: str = "fast"

    @property
    def blocks_alone(self) -> bool:
        """Whether blocks go for good, and nothing else does."""
        return [(axis.name, axis.sets) for axis in self.pattern.axes] == [("depth", None)]

    def arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "quality"}


@dataclass(frozen=True)
class Given:
    """What is known before the model is read: its configuration, the calibration samples, the text to score it on, and
    the command with its recipe."""

    config: Any
    tokenizer: Any
    samples: Any
    text: Any
    source: Path | None
    console: Console
    command: str
    recipe: Mapping[str, Any]
    peers: Peers = ALONE

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def make_smaller(run: Any, job: SmallerModel, given: Given) -> None:
    """Remove parts of the model's shape, in memory, and write what comes out; blocks alone also from files."""
    from thanos import checkpoint
    from thanos.commands.display import display
    from thanos.report.terminal import print_summary
    from thanos.scoring.perplexity import score_windows
    from thanos.shrink import ShrinkPlan
    from thanos.walk.stream import choose_stream

    if run.stream != "no" and job.blocks_alone:
        streaming, why = choose_stream(run.stream, given.source)
        if streaming:
            _stream_blocks(run, job, given, why)
            return
    given.say(f"reading the model {run.model}")
    how: Any = {"allow_missing": run.allow_missing, "trust_remote_code": run.trust_remote_code}
    model = checkpoint.load_model(run.model, checkpoint.DTYPES.get(run.dtype), config=given.config, **how)
    scores: dict[str, Any] = {}

    def score(name: str) -> None:
        if given.text is not None:
            with display(given.console) as shown:
                value = score_windows(model.to(job.device), given.text, progress=shown.window_scored)
            scores.update(_scored(name, value, run, given))

    plan = ShrinkPlan(model, given.samples.tokens, **job.arguments())
    for line in plan.became:
        given.say(line)
    score("dense")
    with display(given.console) as shown:
        shrunk = plan.run(shown.layer_pruned)
    model = shrunk.model
    score("pruned")
    report = _finished(shrunk.report, run, model, given, scores)
    with checkpoint.staged(run.output, overwrite=run.overwrite) as folder:
        if shrunk.sets is None:
            checkpoint.save_smaller(model, given.tokenizer, given.source, folder)
        else:
            checkpoint.save_pruned(model, given.tokenizer, given.source, (), folder)
            shrunk.sets.write(folder)
        report = _written(report, folder, run, given)
    print_summary(report, given.console, run.output)
    given.say(f"saved in {run.output}")


def _stream_blocks(run: Any, job: SmallerModel, given: Given, why: str) -> None:
    """Remove blocks of a model whose blocks are read from its files, one at a time."""
    from thanos import checkpoint
    from thanos.commands.display import display
    from thanos.report.terminal import print_summary
    from thanos.scoring.streamed import score_streamed
    from thanos.shrink import StreamedDepth
    from thanos.walk.stream import load_streamed

    if given.source is None or not checkpoint.weight_files(given.source):
        raise ValueError(f"{run.model} is no directory with safetensors files, which alone are streamed; --stream no")
    given.say(f"streaming the model {run.model} ({why})")
    how: Any = {"config": given.config, "allow_missing": run.allow_missing}
    model, files = load_streamed(run.model, checkpoint.DTYPES.get(run.dtype), **how)
    scores: dict[str, Any] = {}

    def score(name: str, scored: tuple[Any, Any]) -> None:
        if given.text is not None:
            with display(given.console) as shown:
                device = torch.device(job.device or "cpu")
                value = score_streamed(*scored, given.text, device, progress=shown.window_scored)
            scores.update(_scored(name, value, run, given))

    plan = StreamedDepth(model, files, given.source, given.samples.tokens, **job.arguments())
    for line in plan.became:
        given.say(line)
    score("dense", (model, files))
    with display(given.console) as shown:
        report = plan.run(shown.layer_pruned)
    with checkpoint.staged(run.output, overwrite=run.overwrite) as folder:
        plan.save(folder)
        score("pruned", load_streamed(str(folder)))
        report = _written(_finished(report, run, model, given, scores), folder, run, given)
    print_summary(report, given.console, run.output)
    given.say(f"saved in {run.output}")


def _scored(name: str, value: float, run: Any, given: Given) -> dict[str, Any]:
    """Say a model's perplexity; what its report keeps of that."""
    given.say(f"perplexity of the {name} model on {run.evaluate}: {value:.2f}")
    return {name: value, "source": run.evaluate, **given.text.record()}


def _finished(report: Any, run: Any, model: Any, given: Given, scores: dict[str, Any]) -> Any:
    """The report with what only the command knows."""
    return dataclasses.replace(
        report,
        options={**report.options, "model": run.model, "dtype": str(model.dtype).removeprefix("torch.")},
        calibration=given.samples.provenance(),
        perplexity=scores,
        command=given.command,
    )


def _written(report: Any, folder: Path, run: Any, given: Given) -> Any:
    """Write the record and what people read beside the saved model; the report with the sizes."""
    from thanos.report.files import write_files

    one_file = Path(run.model) if Path(run.model).is_file() else None
    return write_files(
        report, folder, source=given.source or one_file, recipe=given.recipe, title=run.output.absolute().name
    )


def _pack(run: Any, given: Given, unfinished: Any) -> bool:
    """Write the compact form of the pruned model beside it, where it is asked for."""
    if run.pack is None:
        return False
    from thanos.compact import pack

    how: Any = {"values": run.pack, "overwrite": True, "trust_remote_code": run.trust_remote_code}
    given.say(f"packed: {pack(unfinished.model, unfinished.packed, **how)}")
    return True


def prune_weights(run: Any, options: WalkOptions, given: Given, unfinished: Any) -> None:
    """Prune the model's weights, block by block into a directory that a run can be taken up from."""
    from thanos import checkpoint
    from thanos.checkpoint.partial import FINISHED
    from thanos.commands.display import display
    from thanos.commands.keeping import identify, keeping, same_for_all
    from thanos.report.terminal import print_summary
    from thanos.scoring.perplexity import score_windows
    from thanos.scoring.streamed import score_streamed
    from thanos.walk.model import prune_model
    from thanos.walk.resume import Keeper
    from thanos.walk.store import from_files, in_memory
    from thanos.walk.stream import choose_stream, load_streamed

    samples, text, source, peers = given.samples, given.text, given.source, given.peers
    identity = identify(run.identity(), options, samples.tokens, checkpoint.fingerprint(run.model, source))
    same_for_all(identity, peers)
    unfinished.compare(identity)
    if peers.object(unfinished.phase) == FINISHED:
        if peers.rank == 0:
            unfinished.finish()
        given.say(f"saved in {run.output}")
        return
    if unfinished.state:
        given.say(f"going on from {unfinished.folder}; blocks that are done: {unfinished.state.get('block', 0)}")
    streaming, why = peers.object(choose_stream(run.stream, source, peers.local_size))
    given.say(f"{'streaming' if streaming else 'reading'} the model {run.model} ({why})")
    # The model stays on the CPU unless its perplexity is asked for: the walk takes one block at a time to the device.
    how: Any = {"config": given.config, "allow_missing": run.allow_missing}
    dtype, files = checkpoint.DTYPES.get(run.dtype), None
    if streaming:
        model, files = load_streamed(run.model, dtype, **how)
    else:
        model = checkpoint.load_model(run.model, dtype, trust_remote_code=run.trust_remote_code, **how)

    def score(name: str) -> None:
        if text is None or peers.object(name in keeper.notes):
            return
        shared = peers if name == "dense" or files is None else ALONE  # the first alone has the pruned model's files
        if shared.size < peers.size and peers.rank:
            return
        with display(given.console) as shown:
            if files is None:
                value = score_windows(model.to(options.device), text, progress=shown.window_scored, peers=shared)
            else:
                pruned = name == "pruned"
                scored = load_streamed(str(unfinished.model), allow_missing=True) if pruned else (model, files)
                device = torch.device(options.device or "cpu")
                value = score_streamed(*scored, text, device, progress=shown.window_scored, peers=shared)
        keeper.notes.update(_scored(name, value, run, given))

    def prepare(names: Iterable[str], folder: Path) -> None:
        if files is not None and not checkpoint.updates_source(model, source, names):
            raise ValueError(
                f"a streamed model keeps its layout and its dtype, and {run.model} cannot be saved so with "
                f"--dtype {run.dtype}; pass --stream no"
            )
        checkpoint.prepare(model, given.tokenizer, source, names, folder)

    def restored(folder: Path) -> Any:
        trust = run.trust_remote_code
        return checkpoint.load_model(str(folder), model.dtype, allow_missing=True, trust_remote_code=trust)

    keeper = Keeper(unfinished, identity, prepare, None if streaming else restored, notes={})
    stores = in_memory if files is None else from_files(files)
    with keeping(unfinished, first=peers.rank == 0):
        score("dense")
        with display(given.console) as shown:
            report = prune_model(
                model,
                samples.tokens,
                **options.arguments(),
                progress=shown.layer_pruned,
                keeper=keeper,
                stores=stores,
                peers=peers,
            )
        score("pruned")
        if peers.rank:
            return
        report = _finished(report, run, model, given, keeper.notes)
        with checkpoint.room_for(unfinished.folder):
            report = _written(report, unfinished.model, run, given)
            packed = _pack(run, given, unfinished)
            unfinished.finish(packed=packed)
    print_summary(report, given.console, run.output)
    given.say(f"saved in {run.output}")
