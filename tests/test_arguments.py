"""Arguments as people write them: a result, or a sentence that says what was wrong; never an error from inside."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import thanos
from thanos.options import METHODS, METRICS, Options, WalkOptions
from thanos.pattern import SemiStructured, Structured, Unstructured, parse_pattern, read_pattern

EXAMPLES = 460  # of each test; they make 22 calls with each, 10,000 in all
ALLOWED = (ValueError, TypeError, torch.linalg.LinAlgError)
quick = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip


def said(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the call returns, or None where it says what is wrong."""
    try:
        return call(*arguments, **options)
    except ALLOWED as error:
        refusal = error
    frames = traceback.extract_tb(refusal.__traceback__)
    last = frames[-1]
    if "pathlib" in last.filename:  # a package from Python 3.13 on; its own sentence about what is no path
        return None
    assert "/thanos" in last.filename, f"{type(refusal).__name__} from inside: {refusal}"
    assert (last.line or "").startswith("raise"), f"{type(refusal).__name__} not meant: {refusal}"
    assert len(str(refusal).split()) > 3, repr(refusal)
    return None


def tensor(shape: tuple[int, ...], kind: str) -> Any:
    dtype = getattr(torch, kind.split()[0])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if "nan" in kind:
        values.fill_(math.nan)
    if "sparse" in kind:
        return values.to_sparse()
    if "meta" in kind:
        return values.to("meta")
    if "grad" in kind:
        values.requires_grad_()
    return values.T if "transposed" in kind and values.dim() == 2 else values


kinds = st.sampled_from([
    "float32", "float64", "float16", "bfloat16", "int64", "bool", "complex64", "float32 nan", "float32 grad",
    "float32 transposed", "float32 sparse", "float32 meta", "uint8", "float8_e4m3fn",
])  # fmt: skip
sizes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
tensors = st.builds(tensor, st.one_of(sizes, st.just((4, 8)), st.just((8, 8))), kinds)
numbers = st.one_of(
    st.integers(-3, 12), st.integers(), st.floats(), st.floats(0, 1), st.booleans(), st.complex_numbers(max_magnitude=3)
)
junk = st.one_of(
    st.none(), numbers, st.text(max_size=8), st.binary(max_size=4), tensors, st.lists(numbers, max_size=3),
    st.dictionaries(st.text(max_size=3), numbers, max_size=2), st.sampled_from([object(), int, Path("nosuch"), ...]),
)  # fmt: skip
patterns = st.one_of(
    st.sampled_from(
        [0.5, "0.5", "50%", "2:4", "structured:0.25", Unstructured(0.3), SemiStructured(1, 2), Structured(0.1)]
    ),
    st.from_regex(r"\A(structured:)?[0-9.]{1,4}([:%e][0-9]{0,3})?\Z"),
    junk,
)
options = st.fixed_dictionaries({}, optional={
    "method": st.one_of(st.sampled_from(METHODS), junk),
    "metric": st.one_of(st.sampled_from(METRICS), junk),
    "block_size": st.one_of(st.integers(1, 9), junk),
    "outlier_fraction": st.one_of(st.floats(0, 1), junk),
    "damping": st.one_of(st.floats(0, 1), junk),
    "backend": st.one_of(st.sampled_from(["auto", "native", "reference"]), junk),
})  # fmt: skip
hessians = st.one_of(st.just(torch.eye(8)), st.just(torch.eye(8, dtype=torch.float64)), junk)
weights = st.one_of(st.just(torch.randn(4, 8)), st.just(torch.randn(4, 8, requires_grad=True)), junk)


@quick
@given(patterns, options, junk, st.text(max_size=6))
def test_patterns_and_options(pattern: Any, chosen: Any, value: Any, name: str) -> None:
    said(parse_pattern, pattern)
    said(read_pattern, pattern)
    said(Options.of, pattern, **chosen)
    said(Options.of, pattern, **{name: value})
    for kind in (Unstructured, Structured):
        said(kind, value)
    said(SemiStructured, value, pattern)


@quick
@given(
    patterns,
    st.fixed_dictionaries({}, optional=dict.fromkeys(
        ("exclude", "passes", "batch_size", "memory_limit", "experts", "device", "method"), junk
    )),
)  # fmt: skip
def test_options_of_a_walk(pattern: Any, chosen: Any) -> None:
    said(WalkOptions.of, pattern, **chosen)


@quick
@given(weights, hessians, patterns, options)
def test_one_layer(weight: Any, hessian: Any, pattern: Any, chosen: Any) -> None:
    pruned = said(thanos.prune_weight, weight, hessian, pattern, **chosen)
    if pruned is not None:
        assert pruned.weight.shape == weight.shape
        assert pruned.weight.dtype == weight.dtype
        assert not pruned.weight[pruned.mask].any()


@quick
@given(st.one_of(st.lists(weights, max_size=3), junk), hessians, patterns)
def test_layers_that_share_an_input(given_weights: Any, hessian: Any, pattern: Any) -> None:
    said(thanos.prune_group, given_weights, hessian, pattern)


@quick
@given(hessians, st.one_of(st.floats(0, 1), junk), st.one_of(st.just("auto"), junk))
def test_factors(hessian: Any, damping: Any, backend: Any) -> None:
    said(thanos.factorise, hessian, damping, backend)


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, max_position_embeddings=16, **sizes)).eval()


@quick
@given(
    data=st.data(),
    samples=st.one_of(st.lists(st.lists(st.one_of(st.integers(0, 17), junk), max_size=4), max_size=3), junk),
    pattern=patterns,
    other=junk,
)
def test_whole_models(tiny: Any, data: Any, samples: Any, pattern: Any, other: Any) -> None:
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    said(thanos.prune_model, tiny, samples, pattern)
    tiny.load_state_dict(state)
    said(thanos.prune_model, other, [[1, 2, 3]], 0.5)
    name = data.draw(st.sampled_from(["progress", "exclude", "passes", "batch_size", "device", "nosuch"]))
    if name != "progress" or other is None:
        said(thanos.prune_model, tiny, [], pattern, **{name: other})


@quick
@given(st.one_of(st.lists(st.text(max_size=20), max_size=3), junk), junk, numbers, numbers, junk, junk)
def test_samples(
    tiny_tokenizer: Any, source: Any, tokenizer: Any, count: Any, length: Any, seed: Any, bos: Any
) -> None:
    said(thanos.load_samples, source, tiny_tokenizer, count, length)
    said(thanos.load_samples, ["a text of words " * 9], tiny_tokenizer, 1, 2, seed)
    said(thanos.load_samples, ["a text of words " * 9], tiny_tokenizer, 1, 2, bos=bos)
    said(thanos.load_samples, ["a text of words " * 9], tokenizer, 1, 2)


@quick
@given(junk, junk)
def test_paths(tmp_path: Path, source: Any, output: Any) -> None:
    said(thanos.pack, source, tmp_path / "output")
    said(thanos.load, source)
    said(thanos.unpack, source, tmp_path / "output")
    said(thanos.pack, tmp_path, output)
