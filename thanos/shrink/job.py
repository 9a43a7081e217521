"""One run of :func:`thanos.shrink_model`: the goals, each checked before any work, and the steps that reach them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import thanos_kernels as kernels
from thanos.options import WalkOptions
from thanos.pattern import Shrink, Unstructured
from thanos.report import LayerReport, ModelReport
from thanos.shrink.configuration import Shape, smaller_config
from thanos.shrink.depth import depth_to_remove
from thanos.shrink.goals import HeadGoal, channels_to_keep, head_goals, whole_count
from thanos.shrink.importance import fisher_scores, remove_channels, remove_heads
from thanos.shrink.probe import block_prefix, linear_weights, probe_sites
from thanos.shrink.rebuild import PROBE, check_same, cut_tensors, kept_slices, rebuilt
from thanos.shrink.skip import Chain
from thanos.shrink.stream import Batch, Inputs, Stream
from thanos.shrink.structure import Site
from thanos.walk.clock import Clock
from thanos.walk.decoder import Layer, find_decoder
from thanos.walk.events import Progress
from thanos.walk.plan import make_plan, work_device
from thanos.walk.replay import run_model

_TRIAL_TOKENS = 4096  # that decide how heads are shared out


class Job:
    """One call of :func:`shrink_model`: everything is checked when it is made."""

    def __init__(
        self,
        model: Any,
        samples: Tensor,
        pattern: Shrink,
        importance: str,
        multiple: int,
        damping: float,
        correction: float,
        batch_size: int | None,
        backend: str,
        device: str | torch.device | None,
    ) -> None:
        self.model, self.samples, self.pattern = model, samples, pattern
        self.options: dict[str, Any] = {
            "importance": importance,
            "multiple": multiple,
            "damping": damping,
            "correction": correction,
            "batch_size": batch_size,
            "backend": backend,
        }
        self.importance = importance
        self.damping, self.correction, self.backend = damping, correction, backend
        self.batch_size, self.device = batch_size, device
        self.became: list[str] = []
        self.decoder = find_decoder(model)
        self.prefix = block_prefix(model, self.decoder.blocks)
        self._options = WalkOptions(Unstructured(0.0), passes=2, batch_size=batch_size, device=device)
        self.clock = Clock(work_device(self.decoder, self._options))
        self.depth = self._depth_goal()
        widths = {axis.name for axis in pattern.axes} & {"channels", "heads", "kv-heads"}
        self.sites = probe_sites(model, self.decoder, samples) if widths else []
        self.width = self._channel_goal()
        self.heads = self._head_goals()

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
        kept = channels_to_keep(axis, width, self.options["multiple"])
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
                chain = self._chain()
                removed = depth_to_remove(chain, self.samples, self.depth, tell=self._scored(progress))
            extra["removed_blocks"] = removed.blocks
            extra["divergences"] = removed.divergences
            self._drop_blocks(chain, removed.blocks)
        if self.width or self.heads:
            reports = self._walk(progress)
        after = linear_weights(find_decoder(self.model))
        return ModelReport(
            method=self.options["importance"],
            pattern=str(self.pattern),
            nominal_sparsity=1 - after / before,
            effective_sparsity=1 - after / before,
            options={**self.options, "device": str(self.device or self.model.device), "became": self.became, **extra},
            layers=reports,
            excluded=[],
            dense={},
            passes=2,
            seconds=self.clock.stop(),
        )

    def _timed(self, part: str) -> AbstractContextManager[None]:
        return self.clock(part)

    def _chain(self) -> Chain:
        return Chain(self.model, self.decoder.blocks, self.samples[:1, :PROBE])

    def _scored(self, progress: Callable[[Progress], None] | None) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self._tell(progress, 0, f"{self.prefix}: blocks to remove", done, total, None)

        return tell

    def _drop_blocks(self, chain: Chain, removed: Sequence[int]) -> None:
        staying = tuple(index for index in range(len(self.decoder.blocks)) if index not in removed)
        tensors = cut_tensors(self.model.state_dict(), self.prefix, staying, {})
        config = smaller_config(
            self.model, Shape(blocks=staying), {name: tensor.shape for name, tensor in tensors.items()}
        )
        wanted = chain.logits(self.samples[:1, :PROBE], removed)
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
        if self.correction > 0:
            stream.dense = list(hidden)
        number = {id(block): index for index, block in enumerate(self.decoder.blocks)}
        kept: dict[int, dict[tuple[str, int], Tensor]] = {}
        reports: list[LayerReport] = []
        total = sum(map(len, sites))
        for turn in range(len(plan.store)):
            block = plan.store.load(turn, plan.device)
            index = number[id(block)]
            kept[index] = {}
            stream.enter(block, turn)
            for site in sites[index]:
                name = f"{self.prefix}.{index}.{site.name}"
                self._tell(progress, turn, name, len(reports), total, None)
                inputs = stream.collect(block, turn, block.get_submodule(site.name), self.backend)
                with self.clock("prune"):
                    report, units = self._cut(block, site, name, inputs, fisher.get((index, site.name)))
                reports.append(report)
                kept[index].update(kept_slices(site, units))
                self._tell(progress, turn, name, len(reports), total, report.relative_loss)
            stream.leave(block, turn)
            plan.store.store(turn)
        self._build(kept)
        return reports

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
            inputs = stream.collect(block, turn, sink, self.backend)
            weight = Layer(site.name, sink).weight.to(inputs.hessian.dtype)
            energy = float(kernels.row_energy(weight.contiguous(), inputs.hessian, backend=self.backend).sum())
            upper, _, _ = kernels.inverse_factor(inputs.hessian, self.damping, backend=self.backend)
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
        if self.importance != "fisher":
            return {}
        sinks = [
            ((index, site.name), self.decoder.blocks[index].get_submodule(site.name), site.units)
            for index, some in enumerate(sites)
            for site in some
        ]
        with self._timed("fisher"):
            return fisher_scores(self.model, sinks, self.samples)

    def _cut(
        self, block: nn.Module, site: Site, name: str, inputs: Inputs, fisher: Tensor | None
    ) -> tuple[LayerReport, Tensor]:
        """Zero the columns that go, update the others, and say which units stay."""
        begin = time.perf_counter()
        sink = block.get_submodule(site.name)
        stored = Layer(name, sink).weight
        hessian = inputs.hessian
        if not bool(hessian.diagonal().isfinite().all()):
            raise ValueError(f"{name}: the activations that reach it hold NaN or infinity")
        weight = stored.to(hessian.dtype)
        energy = float(kernels.row_energy(weight.contiguous(), hessian, backend=self.backend).double().sum())
        try:
            upper, dead, damping = kernels.inverse_factor(hessian, self.damping, backend=self.backend)
        except torch.linalg.LinAlgError as error:
            raise type(error)(f"{name}: {error}") from error
        target = weight.masked_fill(dead, 0)
        if inputs.error is not None:
            target = target + self.correction * (inputs.error.to(hessian.dtype) @ upper.T) @ upper
        if site.kind == "channels":
            assert self.width is not None
            count = self.width[0] - self.width[1]
            removal, units = remove_channels(site, target, upper, inputs, count, self.importance, fisher)
        else:
            removal, units = remove_heads(site, target, upper, inputs, self.heads[0], self.importance, fisher)
        change = removal.weight - weight
        loss = float(kernels.row_energy(change, hessian, backend=self.backend).double().sum())
        stored.copy_(removal.weight)
        report = LayerReport(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            zeros=len(removal.removed) * weight.shape[0],
            sparsity=len(removal.removed) / weight.shape[1],
            loss=loss,
            relative_loss=loss / energy if energy > 0 else 0.0,
            damping=damping,
            shared_with=None,
            tokens=inputs.tokens,
            seconds={"prune": time.perf_counter() - begin},
        )
        return report, units

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
