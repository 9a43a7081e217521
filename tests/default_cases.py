"""Everything that the packages compute, under a default dtype and device that nobody asked for.

``python default_cases.py DEFAULT FOLDER`` runs all cases under the default and leaves in FOLDER what they give, group
by group. It runs in a process of its own, because a buffer too short for what C++ writes into it corrupts the heap; the
packages are imported under the default, because what is kept from one call to the next would otherwise hide it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

DEFAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "meta": lambda: torch.set_default_device("meta"),
}
GROUPS = ("operations", "triton", "pack", "layers", "engine", "walk", "checkpoint")
Case = Callable[[], Any]


@contextmanager
def fresh() -> Iterator[None]:
    """Within, models and modules are made as by somebody who never touched a default."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def spd(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = normal(2 * size, size, seed=1, dtype=torch.float64)
    return (inputs.T @ inputs / len(inputs)).to(dtype)


def upper(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(spd(size, torch.float64)).mT.contiguous()
    return factor.to(dtype)


def cpu(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


def operations(backends: tuple[str, ...], rows: int = 37, width: int = 136) -> dict[str, Case]:
    """The operations of the engine, on each of ``backends`` and in each dtype that it takes."""
    import thanos_kernels as kernels
    from thanos_kernels import linalg, reference, selfcheck

    cases: dict[str, Case] = {}
    for backend in backends:
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float64 and backend in ("native", "triton"):
                continue
            weights, gram, factor = normal(rows, width, dtype=dtype), spd(width, dtype), upper(width, dtype)
            mask, norms = normal(rows, width, seed=2) < 0, normal(width, seed=3, dtype=dtype).abs()
            half = weights.numel() // 2
            kept, removed = torch.arange(width, dtype=torch.int64, device="cpu").split([width - width // 4, width // 4])
            named: dict[str, Case] = {
                "row_solve": partial(kernels.row_solve, gram, weights, mask),
                "row_solve_ex": partial(kernels.row_solve_ex, gram, weights, mask),
                "select_smallest": partial(kernels.select_smallest, weights, norms, half, width // 3),
                "select_smallest of a tensor": partial(
                    kernels.select_smallest, weights, norms, cpu(half, torch.int64), width
                ),
                "select_smallest of none": partial(kernels.select_smallest, weights, norms, 0, width),
                "count_scores": partial(kernels.count_scores, weights, norms, cpu(0, torch.int64), 0),
                "select_below": partial(
                    kernels.select_below, weights, norms, cpu(1 << 29, torch.int64), cpu(1, torch.int64), width // 3
                ),
                "select_per_row": partial(kernels.select_per_row, weights, norms, width // 2),
                "select_n_of_m": partial(kernels.select_n_of_m, weights, 2, 4),
                "column_sweep": partial(kernels.column_sweep, factor, weights, mask),
                "column_sweep_n_of_m": partial(kernels.column_sweep_n_of_m, factor, weights, 2, 4),
                "inverse_factor": partial(kernels.inverse_factor, gram),
                "inverse_factor_ex": partial(kernels.inverse_factor_ex, gram, 0.01),
                "eliminate": partial(kernels.eliminate, gram, 0.01, kept, removed),
                "row_energy": partial(kernels.row_energy, weights, gram),
                "outlier_rows": partial(kernels.outlier_rows, weights, gram, 5),
            }
            for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                if kind == torch.float64 and backend == "triton":
                    continue
                inputs = normal(rows, width, seed=4, dtype=kind)
                named[f"accumulate_hessian of {kind}"] = partial(
                    lambda hessian, *rest, **options: kernels.accumulate_hessian(hessian.clone(), *rest, **options),
                    gram,
                    inputs,
                    0.25,
                )
            for name, case in named.items():
                cases[f"{name}, {backend}, {dtype}"] = partial(case, backend=backend)
    if backends != ("triton",):
        wide = normal(40, 1100), spd(1100)
        cases["outlier_rows of a wide weight"] = partial(kernels.outlier_rows, *wide, 7)
        cases["damp"] = partial(kernels.damp, spd(20), 0.01)
        cases["damped_diagonal of nothing"] = partial(kernels.damped_diagonal, ones(9, 9) * 0, 0.01)
        cases["damping_schedule"] = lambda: [cpu(value, torch.float64) for value in kernels.damping_schedule(0.003)]
        cases["empty_aligned"] = lambda: kernels.empty_aligned(3, 5, ones(1)).zero_()
        for operation in selfcheck.triton.OPERATIONS:
            for number, arguments in enumerate(selfcheck.examples(operation, torch.device("cpu"), small=True)):
                run = partial(selfcheck.results, operation, getattr(reference, operation), arguments)
                cases[f"selfcheck of {operation}, {number}"] = run
        cases["reference.inverse_factor"] = lambda: reference.inverse_factor(spd(30))
        cases["linalg.inverse_factor"] = lambda: linalg.inverse_factor(spd(400))
    else:
        for operation in ("select_n_of_m", "column_sweep_n_of_m", "select_per_row"):
            run = partial(selfcheck.failure, operation, torch.device("cpu"))
            cases[f"selfcheck of {operation}"] = lambda run=run: cpu(run() is None, torch.bool)
    return cases


def pack() -> dict[str, Case]:
    import thanos_kernels as kernels
    from thanos_kernels.pack import reorder

    cases: dict[str, Case] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        weight = normal(128, 256).mul(50).to(dtype)
        weight = torch.where(kernels.select_n_of_m(normal(128, 256, seed=5), 2, 4), 0, weight)
        for layout in ("row_major", "cutlass", "cusparselt"):
            if layout == "cusparselt" and dtype == torch.int8:
                continue
            for backend in ("reference", "native"):

                def run(weight: Tensor = weight, layout: Any = layout, backend: str = backend) -> list[Tensor]:
                    packed = kernels.pack_24(weight, layout, backend=backend)
                    found = [packed.values, packed.metadata, kernels.unpack_24(packed, backend=backend)]
                    return found if layout != "row_major" else [*found, reorder(packed, "cutlass").metadata]

                cases[f"{layout} of {dtype}, {backend}"] = run
    return cases


def layers() -> dict[str, Case]:
    """Compact layers, for few tokens and many."""
    from torch import nn

    from thanos.compact import BitmaskLinear, ColumnPrunedLinear, Sparse24Linear
    from thanos_kernels import select_n_of_m

    kinds: dict[Any, Tensor] = {
        BitmaskLinear: normal(70, 96, seed=6) < 0,
        Sparse24Linear: select_n_of_m(normal(70, 96, seed=6), 2, 4).index_fill(0, cpu([3], torch.int64), False),
        ColumnPrunedLinear: (normal(96, seed=7) < 0).expand(70, 96).index_fill(0, cpu([5], torch.int64), False),
    }
    cases: dict[str, Case] = {}
    for kind, gone in kinds.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):

            def run(kind: Any = kind, gone: Tensor = gone, dtype: torch.dtype = dtype) -> list[Tensor]:
                with fresh():
                    linear = nn.Linear(96, 70)
                linear.weight = nn.Parameter(normal(70, 96, seed=8).masked_fill(gone, 0), requires_grad=False)
                linear.bias = nn.Parameter(normal(70, seed=9), requires_grad=False)
                layer = kind.from_linear(linear.to(dtype))
                results = [layer(normal(tokens, 96, seed=10, dtype=dtype)) for tokens in (1, 3, 200)]
                new = kind(96, 70, True, "cpu", dtype)
                new.load_state_dict(layer.state_dict())
                return [*results, new(normal(2, 96, seed=11, dtype=dtype)), layer.weight]

            cases[f"{kind.__name__}, {dtype}"] = run
    return cases


def engine() -> dict[str, Case]:
    """One layer, by every method and pattern."""
    import thanos

    hessian = spd(160)
    hessian[7] = hessian[:, 7] = 0
    cases: dict[str, Case] = {}
    for method in ("thanos", "sparsegpt", "wanda", "magnitude"):
        for pattern in ("0.5", "2:4", "structured:0.3"):
            for alpha in (0.0, 0.1):
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    weight = normal(48, 160, seed=12, dtype=dtype)

                    def run(weight: Tensor = weight, pattern: str = pattern, **options: Any) -> list[Tensor]:
                        result = thanos.prune_weight(weight, hessian, pattern, **options)
                        return [result.weight, result.mask, cpu([result.loss, result.damping], torch.float64)]

                    case = partial(run, method=method, outlier_fraction=alpha, block_size=64)
                    cases[f"{method}, {pattern}, {alpha}, {dtype}"] = case
    cases["reference"] = partial(run, normal(24, 160), "0.5", backend="reference")
    for metric in ("obs", "magnitude"):
        cases[metric] = partial(run, normal(24, 160), "0.5", metric=metric)
    return cases


def tiny_llama(seed: int = 0) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with fresh():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int = 6) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(3)
    return torch.randint(3, 128, (count, 20), generator=generator, dtype=torch.int64, device="cpu")


def walk() -> dict[str, Case]:
    """A small model, by every method, in one pass and in two."""
    import thanos

    def run(dtype: torch.dtype, pattern: str, **options: Any) -> list[Tensor]:
        model = tiny_llama().to(dtype)
        report = thanos.prune_model(model, tokens(), pattern, batch_size=2, **options)
        losses = cpu([layer.loss for layer in report.layers], torch.float64)
        return [*(parameter.detach() for parameter in model.parameters()), losses]

    cases: dict[str, Case] = {}
    for passes in (1, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            cases[f"{passes} passes, {dtype}"] = partial(run, dtype, "0.5", passes=passes)
    for method in ("sparsegpt", "wanda", "magnitude"):
        cases[method] = partial(run, torch.float32, "2:4", method=method)
    cases["structured"] = partial(run, torch.float32, "structured:0.25", outlier_fraction=0.1)
    return cases


def checkpoint(folder: Path) -> dict[str, Case]:
    """Compact checkpoints: written, read, run and taken back."""
    import thanos

    def run(dtype: torch.dtype, pattern: str) -> list[Tensor]:
        model = tiny_llama()
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                hessian = torch.eye(parameter.shape[1], dtype=torch.float32, device="cpu")
                parameter.data = thanos.prune_weight(parameter.detach(), hessian, pattern, method="magnitude").weight
        number = len(list(folder.iterdir()))
        places = [folder / f"{number}-{name}" for name in ("dense", "compact", "again")]
        with fresh():
            model.to(dtype).save_pretrained(places[0])
        thanos.pack(places[0], places[1])
        thanos.unpack(places[1], places[2])
        same = all((places[2] / path.name).read_bytes() == path.read_bytes() for path in places[0].iterdir())
        loaded = thanos.load(places[1])
        held = [tensor for name, tensor in sorted(loaded.state_dict().items())]
        results = [cpu(same, torch.bool), *held]
        with torch.inference_mode():
            for few in (1, 6):
                results.append(loaded(tokens(few)).logits)
        return results

    kinds = {"0.5": torch.float32, "2:4": torch.bfloat16, "structured:0.3": torch.float16}
    return {pattern: partial(run, dtype, pattern) for pattern, dtype in kinds.items()}


def group_of(name: str, folder: Path) -> dict[str, Case]:
    if name == "operations":
        return operations(("reference", "native", "auto"))
    if name == "triton":
        return operations(("triton",), rows=9, width=40)
    return {
        "pack": pack,
        "layers": layers,
        "engine": engine,
        "walk": walk,
        "checkpoint": partial(checkpoint, folder),
    }[name]()


def outcome(case: Case) -> list[Tensor] | str:
    """The tensors that a case gives, or the error that it raises."""
    try:
        result = case()
    except Exception as error:  # whatever it is, it is what the case gives
        return f"{type(error).__name__}: {error}"
    values = result if isinstance(result, tuple | list) else [result]
    return [value.clone() if isinstance(value, Tensor) else cpu(value, torch.float64) for value in values]


def main(default: str, folder: Path) -> None:
    faulthandler.enable()
    DEFAULTS[default]()
    for name in GROUPS:
        results = {}
        for case, run in group_of(name, folder).items():
            print(f"{name}: {case}", flush=True)  # the last one printed is where the process died
            results[case] = outcome(run)
        torch.save(results, folder / f"{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
