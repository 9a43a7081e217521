"""The operations of the pruning engine, on tensors: each in plain PyTorch, in C++ for the CPU, in Triton for GPUs."""

from thanos_kernels.damping import MAX_DAMPING, damp, damped_diagonal, damping_schedule
from thanos_kernels.dispatch import BACKENDS, backends
from thanos_kernels.linalg import bfloat16_pays, empty_aligned, multiplies_bfloat16
from thanos_kernels.ops import (
    accumulate_hessian,
    column_sweep,
    column_sweep_n_of_m,
    count_scores,
    eliminate,
    inverse_factor,
    inverse_factor_ex,
    outlier_rows,
    row_energy,
    row_solve,
    row_solve_ex,
    score_digits,
    select_below,
    select_n_of_m,
    select_per_row,
    select_smallest,
)
from thanos_kernels.pack import Packed24, pack_24, unpack_24
from thanos_kernels.scope import plain_arithmetic

__all__ = [
    "BACKENDS",
    "MAX_DAMPING",
    "Packed24",
    "accumulate_hessian",
    "backends",
    "bfloat16_pays",
    "column_sweep",
    "column_sweep_n_of_m",
    "count_scores",
    "damp",
    "damped_diagonal",
    "damping_schedule",
    "eliminate",
    "empty_aligned",
    "inverse_factor",
    "inverse_factor_ex",
    "multiplies_bfloat16",
    "outlier_rows",
    "pack_24",
    "plain_arithmetic",
    "row_energy",
    "row_solve",
    "row_solve_ex",
    "score_digits",
    "select_below",
    "select_n_of_m",
    "select_per_row",
    "select_smallest",
    "unpack_24",
]
