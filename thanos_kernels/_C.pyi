# ruff: noqa: N999
# Pointers are addresses (``Tensor.data_ptr()``), strides count elements; see csrc/kernels.h.

interface: str

def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def row_solve(
    gram: int,
    gram_stride: int,
    weights: int,
    weights_stride: int,
    mask: int,
    mask_stride: int,
    out: int,
    info: int,
    rows: int,
    width: int,
    threads: int,
    /,
) -> None: ...
def select_smallest(
    weights: int,
    stride: int,
    norms: int,
    rows: int,
    columns: int,
    count: int,
    width: int,
    mask: int,
    taken: int,
    threads: int,
    /,
) -> None: ...
def count_scores(
    weights: int,
    stride: int,
    norms: int,
    rows: int,
    columns: int,
    prefix: int,
    shift: int,
    bits: int,
    counts: int,
    threads: int,
    /,
) -> None: ...
def select_below(
    weights: int,
    stride: int,
    norms: int,
    rows: int,
    columns: int,
    threshold: int,
    ties: int,
    width: int,
    mask: int,
    taken: int,
    threads: int,
    /,
) -> None: ...
def select_per_row(
    weights: int, stride: int, norms: int, rows: int, columns: int, count: int, mask: int, threads: int, /
) -> None: ...
def select_n_of_m(
    scores: int, stride: int, rows: int, columns: int, n: int, m: int, mask: int, threads: int, /
) -> None: ...
def column_sweep(
    factor: int,
    factor_stride: int,
    weights: int,
    stride: int,
    mask: int,
    mask_stride: int,
    errors: int,
    rows: int,
    width: int,
    threads: int,
    /,
) -> None: ...
def column_sweep_n_of_m(
    factor: int,
    factor_stride: int,
    weights: int,
    stride: int,
    n: int,
    m: int,
    errors: int,
    mask: int,
    rows: int,
    width: int,
    threads: int,
    /,
) -> None: ...
def accumulate_hessian(
    hessian: int,
    width: int,
    inputs: int,
    stride: int,
    tokens: int,
    kind: int,
    keep: float,
    scale: float,
    threads: int,
    /,
) -> None: ...
