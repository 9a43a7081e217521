"""One run of :func:`thanos.shrink_model`: the goals, each checked before any work, and the steps that reach them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.options import WalkOptions
from thanos.pattern import Shrink, Unstructured
from thanos.report import BlockReport, LayerReport, ModelReport
from thanos.shrink.configuration import Shape, smaller_config
from thanos.shrink.cutting import Cutter
from thanos.shrink.depth import depth_to_remove
from thanos.shrink.goals import HeadGoal, channels_to_keep, head_goals, whole_count
from thanos.shrink.importance import fisher_scores, remove_heads
from thanos.shrink.options import ShrinkOptions
from thanos.shrink.probe import block_prefix, check_nothing_shared, linear_weights, probe_sites
from thanos.shrink.rebuild import PROBE, check_same, cut_tensors, kept_slices, rebuilt
from thanos.shrink.skip import Chain
from thanos.shrink.stream import Batch, Stream
from thanos.shrink.structure import Site
from thanos.walk.clock import Clock
from thanos.walk.decoder import Layer, find_decoder
from thanos.walk.events import Progress
from thanos.walk.finite import check_finite
from thanos.walk.plan import Plan, make_plan, work_device
from thanos.walk.reconstruct import Task, local_names, reconstruct
from thanos.walk.replay import run_model

_TRIAL_TOKENS = 4096  # that decide how heads are shared out


class Job:
    """One call of :func:`shrink_model`: everything is checked when it is made."""

    def __init__(self, model: Any, samples: Tensor, pattern: Shrink, options: ShrinkOptions) -> None:
        self.model, self.samples, self.pattern, self.options = model, samples, pattern, options
        self.became: list[str] = []
        self.decoder = find_decoder(model)
        check_nothing_shared(model, self.decoder)
        check_finite(layer for block in self.decoder.layers for layer in block)
        self.prefix = block_prefix(model, self.decoder.blocks)
        self._options = WalkOptions(
            Unstructured(0.0),
            passes=2,
            batch_size=options.batch_size,
            device=options.device,
            reconstruct=options.reconstruct,
        )
        self.clock = Clock(work_device(self.decoder, self._options))
        self.depth = self._depth_goal()
        widths = {axis.name for axis in pattern.axes} & {"channels", "heads", "kv-heads"}
        self.sites = probe_sites(model, self.decoder, samples) if widths else []
        self.width = self._channel_goal()
        self.heads = self._head_goals()
        self.blocks: list[BlockReport] = []

    # The goals, each checked against the configuration before any work.

    def _depth_goal(self) -> int:
        axis = self.pattern.axis("depth")
        if axis is None:
            return 0
        total = len(self.decoder.blocks)
        count = whole_count(axis, total, "block")
        blocks = tuple(range(total - count))
        self._check(Shape(blocks=blocks), {})
        self.became.append(f"{axis}: {total} blocks become {total - count}")
        return count

    def _channel_goal(self) -> tuple[int, int] | None:
        axis = self.pattern.axis("channels")
        if axis is None:
            return None
        sites = self._all_sites("channels")
        widths = sorted({site.units for site in sites})
        if len(widths) > 1:
            raise ValueError(
                f"the feed-forwards of {type(self.model).__name__} have {', '.join(map(str, widths))} channels; "
                "only models with one width are made smaller"
            )
        width = widths[0]
        kept = channels_to_keep(axis, width, self.options.multiple)
        first = torch.arange(width, dtype=torch.int64, device="cpu") < kept
        self._check(Shape(width=(width, kept)), {index: kept_slices(site, first) for index, site in enumerate(sites)})
        self.became.append(f"{axis}: {width} channels become {kept}, {1 - kept / width:.1%} fewer")
        return width, kept

    def _head_goals(self) -> list[HeadGoal]:
        axis = self.pattern.axis("heads") or self.pattern.axis("kv-heads")
        if axis is None:
            return []
        sites = self._all_sites("heads")
        kinds = {(site.units, site.groups) for site in sites}
        if len(kinds) > 1:
            raise ValueError(f"the attention of {type(self.model).__name__} differs between blocks; its heads stay")
        ((units, groups),) = kinds

        def possible(heads: int, left: int) -> str | None:
            even = left == groups and groups < units
            number = torch.arange(units, dtype=torch.int64, device="cpu")
            stays = number % (units // groups) < heads // groups if even else sites[0].group < left
            kept = {index: kept_slices(site, stays) for index, site in enumerate(sites)}
            try:
                self._check(Shape(heads=(heads, left, self._head_size())), kept)
            except ValueError as error:
                return str(error)
            return None

        goals = head_goals(axis, units, groups, possible)
        ways = " or ".join(f"{goal.heads} in {goal.groups} groups" for goal in goals)
        self.became.append(f"{axis}: {units} query heads in {groups} groups become {ways}")
        return goals

    def _head_size(self) -> int:
        site = self.sites[0].heads
        assert site is not None
        sink = next(cut for cut in site.cuts if cut.parameter.startswith(f"{site.name}."))
        return len(sink.owner) // site.units

    def _all_sites(self, kind: str) -> list[Site]:
        found: list[Site] = []
        for index, sites in enumerate(self.sites):
            site = sites.channels if kind == "channels" else sites.heads
            if site is None:
                raise ValueError(
                    f"{self.prefix}.{index}: {sites.reason[kind]}; {kind} cannot be removed from "
                    f"{type(self.model).__name__}"
                )
            found.append(site)
        return found

    def _check(self, shape: Shape, kept: Any) -> Any:
        blocks = shape.blocks if shape.blocks is not None else tuple(range(len(self.decoder.blocks)))
        tensors = cut_tensors(self.model.state_dict(), self.prefix, blocks, kept, shapes_only=True)
        return smaller_config(self.model, shape, {name: tensor.shape for name, tensor in tensors.items()})

    # The work.

    def run(self, progress: Callable[[Progress], None] | None) -> ModelReport:
        before = linear_weights(self.decoder)
        reports: list[LayerReport] = []
        extra: dict[str, Any] = {}
        if self.depth:
            with self._timed("depth"):
                removed = depth_to_remove(
                    self.model,
                    self.decoder,
                    self.samples,
                    self.depth,
                    device=work_device(self.decoder, self._options),
                    tell=self._scored(progress),
                )
            extra["removed_blocks"] = removed.blocks
            extra["divergences"] = removed.divergences
            self._drop_blocks(removed.blocks)
        if self.width or self.heads:
            reports = self._walk(progress)
        after = linear_weights(find_decoder(self.model))
        return ModelReport(
            method=self.options.importance,
            pattern=str(self.pattern),
            nominal_sparsity=1 - after / before,
            effective_sparsity=1 - after / before,
            options={
                **self.options.record(),
                "device": str(self.options.device or self.model.device),
                "became": self.became,
                **extra,
            },
            layers=reports,
            excluded=[],
            dense={},
            passes=2,
            seconds=self.clock.stop(),
            blocks=self.blocks,
        )

    def _timed(self, part: str) -> AbstractContextManager[None]:
        return self.clock(part)

    def _scored(self, progress: Callable[[Progress], None] | None) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self._tell(progress, 0, f"{self.prefix}: blocks to remove", done, total, None)

        return tell

    def _drop_blocks(self, removed: Sequence[int]) -> None:
        staying = tuple(index for index in range(len(self.decoder.blocks)) if index not in removed)
        tensors = cut_tensors(self.model.state_dict(), self.prefix, staying, {})
        config = smaller_config(
            self.model, Shape(blocks=staying), {name: tensor.shape for name, tensor in tensors.items()}
        )
        probe = self.samples[:1, :PROBE]
        wanted = Chain(self.model, self.decoder.blocks, probe).logits(probe, removed)
        self.model = rebuilt(self.model, config, tensors)
        check_same(wanted, self.model, self.samples)
        self.decoder = find_decoder(self.model)
        self.sites = [self.sites[index] for index in staying] if self.sites else []

    def _walk(self, progress: Callable[[Progress], None] | None) -> list[LayerReport]:
        if len(self.heads) > 1:
            with self._timed("heads"):
                self.heads = [self._cheaper_heads()]
        sites = [list(self._wanted_sites(index)) for index in range(len(self.decoder.blocks))]
        fisher = self._fisher(sites)
        plan, hidden = make_plan(self.model, self.decoder, self.samples, self._options, self.clock)
        stream = Stream([Batch(*batch) for batch in zip(hidden, plan.calls, strict=True)], self.clock)
        if self.options.correction > 0 or self.options.reconstruct:
            stream.dense, stream.corrected = list(hidden), self.options.correction > 0
        number = {id(block): index for index, block in enumerate(self.decoder.blocks)}
        cutter = Cutter(
            self.options, self.width[0] - self.width[1] if self.width else 0, self.heads[0] if self.heads else None
        )
        kept: dict[int, dict[tuple[str, int], Tensor]] = {}
        reports: list[LayerReport] = []
        total = sum(map(len, sites))
        for turn in range(len(plan.store)):
            block = plan.store.load(turn, plan.device)
            index = number[id(block)]
            kept[index] = {}
            stream.enter(block, turn)
            last = None
            for site in sites[index]:
                name, sink = f"{self.prefix}.{index}.{site.name}", block.get_submodule(site.name)
                self._tell(progress, turn, name, len(reports), total, None)
                adds = self._adds(site, sites[index], plan, stream)
                try:
                    inputs = stream.collect(block, turn, sink, self.options.backend, keep=adds is not None)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                with self.clock("prune"):
                    cut = cutter(sink, site, name, inputs, fisher.get((index, site.name)))
                    last = cut.change, adds
                reports.append(cut.report)
                kept[index].update(kept_slices(site, cut.units))
                self._tell(progress, turn, name, len(reports), total, cut.report.relative_loss)
            if self.options.reconstruct:
                self._reconstruct(block, turn, plan, stream)
            if last is not None and last[1] is not None:
                stream.go_on(last[0], last[1])
            else:
                stream.leave(block, turn)
            plan.store.store(turn)
        self._build(kept)
        return reports

    def _adds(self, site: Site, sites: Sequence[Site], plan: Plan, stream: Stream) -> float | None:
        """The multiple of a layer's output in the block's, where the block need not run again once it is cut."""
        if site is not sites[-1] or self.options.reconstruct:
            return None
        hidden = stream.batches[0].hidden
        tokens = self.samples.numel()
        inputs = sum(len(cut.owner) for cut in site.cuts if cut.parameter == f"{site.name}.weight")
        needs = tokens * (inputs + hidden.shape[-1]) * hidden.element_size()
        return site.adds if needs <= plan.memory_limit else None

    def _reconstruct(self, block: nn.Module, turn: int, plan: Plan, stream: Stream) -> None:
        """Train what stays of a block; what was cut is zero and stays so."""
        parameters = sorted({layer.parameter_name for layer in plan.decoder.layers[turn]})
        weights, vectors = local_names(block, parameters), local_names(block, plan.vectors[turn])
        hidden = [batch.hidden for batch in stream.batches]
        with self.clock("reconstruct"):
            task = Task(turn, block, plan.steps, hidden, stream.wanted, weights, vectors)
            self.blocks.append(reconstruct(task, self.options.reconstruct, self.blocks))

    def _cheaper_heads(self) -> HeadGoal:
        """Of two ways to remove as many query heads the one that costs less, over a part of the samples."""
        samples = self.samples[: max(1, _TRIAL_TOKENS // self.samples.shape[1])]
        apart = Clock(work_device(self.decoder, self._options))
        plan, hidden = make_plan(self.model, self.decoder, samples, self._options, apart)
        stream = Stream([Batch(*batch) for batch in zip(hidden, plan.calls, strict=True)], apart)
        number = {id(block): index for index, block in enumerate(self.decoder.blocks)}
        losses = dict.fromkeys(self.heads, 0.0)
        for turn in range(len(plan.store)):
            block = plan.store.load(turn, plan.device)
            site = self.sites[number[id(block)]].heads
            assert site is not None
            sink = block.get_submodule(site.name)
            inputs = stream.collect(block, turn, sink, self.options.backend)
            weight = Layer(site.name, sink).weight.to(inputs.hessian.dtype)
            energy = float(kernels.row_energy(weight.contiguous(), inputs.hessian, backend=self.options.backend).sum())
            upper, _, _ = kernels.inverse_factor(inputs.hessian, self.options.damping, backend=self.options.backend)
            for goal in self.heads:
                removal, _ = remove_heads(site, weight, upper, inputs, goal, "obs", None)
                losses[goal] += removal.loss / max(energy, 1e-30)
            stream.leave(block, turn)
            plan.store.store(turn)
        best = min(self.heads, key=lambda goal: losses[goal])
        self.became = [
            f"{sentence.partition(' become ')[0]} become {best.heads} in {best.groups} groups"
            if " or " in sentence
            else sentence
            for sentence in self.became
        ]
        return best

    def _wanted_sites(self, index: int) -> list[Site]:
        sites = self.sites[index]
        wanted = [sites.heads if self.heads else None, sites.channels if self.width else None]
        return [site for site in wanted if site is not None]

    def _fisher(self, sites: list[list[Site]]) -> dict[tuple[int, str], Tensor]:
        if self.options.importance != "fisher":
            return {}
        sinks = [
            ((index, site.name), self.decoder.blocks[index].get_submodule(site.name), site.units)
            for index, some in enumerate(sites)
            for site in some
        ]
        with self._timed("fisher"):
            return fisher_scores(self.model, sinks, self.samples)

    def _build(self, kept: Any) -> None:
        blocks = tuple(range(len(self.decoder.blocks)))
        goal = self.heads[0] if self.heads else None
        heads = (goal.heads, goal.groups, self._head_size()) if goal else None
        tensors = cut_tensors(self.model.state_dict(), self.prefix, blocks, kept)
        config = smaller_config(
            self.model, Shape(self.width, heads), {name: tensor.shape for name, tensor in tensors.items()}
        )
        smaller = rebuilt(self.model, config, tensors)
        check_same(run_model(self.model, self.samples[:1, :PROBE]).logits, smaller, self.samples)
        self.model = smaller

    def _tell(
        self,
        progress: Callable[[Progress], None] | None,
        block: int,
        name: str,
        done: int,
        total: int,
        loss: float | None,
    ) -> None:
        if progress is not None:
            blocks, seconds = len(self.decoder.blocks), self.clock.elapsed()
            progress(Progress(block, blocks, name, done, total, loss, seconds))
