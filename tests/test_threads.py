"""Several Python threads at once compute what one after the other does, to the bit; so does a forked process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thanos
import thanos_kernels as kernels
from thanos.compact import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear
from thanos_kernels import native

ROOT = Path(__file__).parents[1]
ROUNDS = 6
Job = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def _two_threads_inside_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def at_once(jobs: list[Job], rounds: int = ROUNDS) -> None:
    """Run the jobs one after the other, then several times each in a thread of its own, and compare."""
    wanted = [job() for job in jobs]
    start = threading.Barrier(len(jobs))
    faults: list[str] = []

    def work(number: int) -> None:
        start.wait()
        for turn in range(rounds):
            try:
                found = jobs[number]()
            except Exception as error:
                faults.append(f"job {number}, turn {turn}: {error!r}")
                return
            if not all(have.equal(want) for have, want in zip(found, wanted[number], strict=True)):
                faults.append(f"job {number}, turn {turn}: another result")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def layer(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=draw)
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "structured:0.3"])
@pytest.mark.parametrize("method", ["thanos", "sparsegpt", "wanda", "magnitude"])
def test_layers_pruned_at_once(method: str, pattern: str) -> None:
    def prune(weight: Tensor, hessian: Tensor) -> list[Tensor]:
        result = thanos.prune_weight(weight, hessian, pattern, method=method, block_size=64, outlier_fraction=0.1)
        return [result.weight, result.mask, torch.tensor([result.loss, result.damping], dtype=torch.float64)]

    at_once([partial(prune, *layer(seed, rows, 320)) for seed, rows in ((0, 250), (1, 190), (2, 60))])


def test_kernels_at_once() -> None:
    """More threads than processors, in kernels that keep scratch memory for each of their own threads."""

    def run(weights: Tensor, hessian: Tensor) -> list[Tensor]:
        mask, taken = kernels.select_smallest(weights, hessian.diagonal().sqrt(), weights.numel() // 3, 100)
        gram, part = hessian[:100, :100], weights[:, :100]
        factor, _, _ = kernels.inverse_factor(gram)
        swept, chosen = kernels.column_sweep_n_of_m(factor, part, 2, 4)
        return [
            mask,
            taken,
            kernels.row_solve(gram, part, mask),
            kernels.column_sweep(factor, part, mask),
            swept,
            chosen,
            kernels.select_per_row(weights, hessian.diagonal().sqrt(), 60),
            kernels.select_n_of_m(weights, 2, 4),
            kernels.accumulate_hessian(torch.zeros_like(gram), part.bfloat16(), 1.0),
            kernels.unpack_24(kernels.pack_24(torch.where(kernels.select_n_of_m(weights, 2, 4), 0, weights))),
        ]

    at_once([partial(run, *layer(seed, 500 - 40 * seed, 160)) for seed in range(5)], rounds=12)


@pytest.mark.parametrize("kind", [BitmaskLinear, Sparse24Linear, ColumnPrunedLinear])
def test_compact_layers_at_once(kind: type[BitmaskLinear | Sparse24Linear | ColumnPrunedLinear]) -> None:
    """Layers of different sizes, whose decoded tiles share a thread's memory but never another's."""

    def run(sparse: nn.Module, few: Tensor, many: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [sparse(few), sparse(many)]

    jobs: list[Job] = []
    for seed, rows in enumerate((130, 70, 200)):
        torch.manual_seed(seed)
        linear = nn.Linear(96, rows)
        if kind is ColumnPrunedLinear:
            linear.weight.data[:, ::3] = 0
        else:
            linear.weight.data[kernels.select_n_of_m(linear.weight.data.abs(), 2, 4)] = 0
        jobs.append(partial(run, kind.from_linear(linear), torch.randn(2, 96), torch.randn(300, 96)))
    at_once(jobs, rounds=40)


def test_models_pruned_and_loaded_at_once(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Whole walks, while others read compact checkpoints.

    Models are read before: Transformers' ``from_pretrained`` patches its classes, and is not safe in two threads.
    """
    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    models = {name: tiny_model("llama", hidden_size=size) for name, size in (("a", 32), ("b", 64))}
    for name, model in models.items():
        thanos.prune_model(model, tokens, "0.5", method="magnitude")
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
        thanos.pack(tmp_path / name, tmp_path / f"{name}-compact")

    def walk(name: str) -> list[Tensor]:
        model = deepcopy(models[name])
        thanos.prune_model(model, tokens, "2:4")
        return [parameter.detach() for parameter in model.parameters()]

    def load(name: str) -> list[Tensor]:
        model = thanos.load(tmp_path / f"{name}-compact")
        with torch.inference_mode():
            return [model(tokens).logits]

    register = nn.Module.register_parameter
    at_once([partial(run, name) for name in models for run in (walk, load)], rounds=3)
    assert nn.Module.register_parameter is register
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    torch.compiler.reset()
    torch.compile(nn.Linear(3, 3), backend=count)(torch.ones(1, 3))
    assert compiled == 1  # nothing that the walks did in turn keeps PyTorch from it


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks() -> None:
    script = """
        import os, signal, torch
        import thanos_kernels as kernels
        torch.set_num_threads(2)
        big, small = torch.randn(700, 700), torch.randn(64, 300)
        (big @ big).exp().sum()  # PyTorch has started its threads; no kernel of ours has run
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            taken = kernels.select_smallest(small, torch.ones(300), 5000, 300)[1]
            kernels.select_n_of_m(small, 2, 4)
            os._exit(0 if int(taken) == 5000 else 1)
        raise SystemExit(os.waitpid(child, 0)[1])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads what GNU OpenMP says of itself")
@pytest.mark.parametrize(
    ("command", "given", "spins"),
    [
        (["-m", "thanos.prune", "--help"], {}, "1000"),
        (["-m", "thanos.prune", "--help"], {"GOMP_SPINCOUNT": "77"}, "77"),
        (["-m", "thanos.prune", "--help"], {"OMP_WAIT_POLICY": "passive"}, "0"),
        (["-c", "import benchmarks, thanos", "thanos.prune"], {}, "300000"),
    ],
)
def test_threads_of_a_command_sleep_soon_and_those_of_a_users_process_wait_as_they_did(
    command: list[str], given: dict[str, str], spins: str
) -> None:
    """On a machine shared with one busy process, a walk took many times as long with threads that spin."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = {**kept, **given, "OMP_DISPLAY_ENV": "verbose"}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    if found is None:
        pytest.skip("this PyTorch is not built with GNU OpenMP")
    assert found[1] == spins
