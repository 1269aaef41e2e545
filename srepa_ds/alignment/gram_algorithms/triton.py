"""The structural losses as fused Triton kernels: no N x N tile is ever written to memory.

Optional: triton is imported at the first call. The kernels run on CUDA devices, and anywhere under
Triton's interpreter, for which TRITON_INTERPRET=1 must be set before that call.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.alignment.gram_algorithms.parts import PairSum, Temperatures


class Tiling(NamedTuple):
    """The sizes of a kernel's pieces: rows x columns of a Gram tile, channels read at a time."""

    rows: int
    columns: int
    chunk: int
    precision: str
    num_warps: int
    num_stages: int


# Chosen from what the assembler reports for sm_90 (registers of a thread, shared memory of a
# program), not from timings: the largest that keep the tile, its operands and their split in
# registers. float32: up to 255 registers and 36 KiB, at most four numbers spilled (triton 3.6 to
# 3.9), two programs to a multiprocessor; 128 columns or chunks of 32 spill. float64: up to 228
# registers and 20 KiB; 64 columns spill. Widths that are not a multiple of 16 are read number by
# number and spill a little in float32.
#
# "tf32x3" writes each factor as a sum of two TF32 numbers and takes three of the four products on
# the tensor cores, each chunk from zero and added to the tile in float32: with 768 channels an
# emulation of that gives the value to 2e-7 and the gradient to 1e-7, where float32 gives 1e-8 and
# 3e-8. "ieee" is float32 itself, on the ordinary cores at a several times lower peak. "tf32" alone
# would keep three decimal digits, too few.
TILINGS = {
    torch.float32: Tiling(64, 64, 16, "tf32x3", num_warps=4, num_stages=4),
    torch.float64: Tiling(32, 32, 16, "ieee", num_warps=4, num_stages=3),
}


def unavailable(device: torch.device) -> str | None:
    """Returns the reason why the kernels cannot run on `device`, or None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from srepa_ds.alignment.gram_algorithms import triton_kernels as kernels

    if device.type == "cuda" or kernels.INTERPRETED:
        return None
    return (
        f"triton has no backend for the device '{device.type}', only its interpreter, for tests, "
        "which TRITON_INTERPRET=1 turns on"
    )


def mse_triton(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
) -> PairSum:
    """Returns the sum of (S^S_ij - S^T_ij)^2 over i != j (Eq. 6) in one pass over the tiles.

    Tokens are unit ones, of one dtype, float32 or float64. Raises ValueError where the kernels
    cannot run.
    """
    kernels = _kernels(student.device)
    student, teacher = student.contiguous(), teacher.contiguous()
    row_values = student.new_empty(student.shape[:2], dtype=torch.float64)
    gradient = torch.zeros_like(student) if with_gradient else None
    # Without a gradient the kernel never looks at the pointer it is given in its place.
    target = student if gradient is None else gradient
    arguments = (student, teacher, row_values, target)
    _launch(kernels.mse_kernel, arguments, WITH_GRADIENT=with_gradient)
    return PairSum(row_values.sum(), gradient)


def kl_triton(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the sum over rows i of KL(P^T_i || P^S_i) (Eq. 7-8) by an online softmax.

    One pass for the value and the rows' statistics, a second for the gradient, which needs the
    statistics of rows and of columns. Tokens as for `mse_triton`.
    """
    kernels = _kernels(student.device)
    student, teacher = student.contiguous(), teacher.contiguous()
    images, num_tokens, _ = student.shape
    row_values = student.new_empty((images, num_tokens), dtype=torch.float64)
    statistics = student.new_empty((images, 4, num_tokens))
    # Compiled in: as arguments they would arrive in float32.
    scales = {
        "STUDENT_SCALE": 1 / temperatures.student,
        "TEACHER_SCALE": 1 / temperatures.teacher,
    }
    _launch(kernels.kl_rows_kernel, (student, teacher, row_values, statistics), **scales)
    if not with_gradient:
        return PairSum(row_values.sum(), None)
    gradient = torch.zeros_like(student)
    _launch(kernels.kl_gradient_kernel, (student, teacher, statistics, gradient), **scales)
    return PairSum(row_values.sum(), gradient)


def _kernels(device: torch.device) -> ModuleType:
    reason = unavailable(device)
    if reason:
        raise ValueError(f"algorithm 'triton' cannot run here: {reason}; 'auto' runs anywhere")
    from srepa_ds.alignment.gram_algorithms import triton_kernels

    return triton_kernels


def _launch(kernel: Any, tensors: tuple[Tensor, ...], **constants: bool | float) -> None:
    student, teacher, *_ = tensors
    images, num_tokens, d_student = student.shape
    d_teacher = teacher.shape[2]
    tiling = TILINGS[student.dtype]
    assert teacher.dtype == student.dtype
    blocks = -(-num_tokens // tiling.rows)
    with torch.cuda.device_of(student):
        kernel[(images * blocks,)](
            *tensors, num_tokens, d_student, d_teacher, **constants, **launch_options(tiling)
        )


def launch_options(tiling: Tiling) -> dict[str, Any]:
    """Returns a tiling as the constants and compiler options of a kernel."""
    return {
        "ROWS": tiling.rows,
        "COLUMNS": tiling.columns,
        "CHUNK": tiling.chunk,
        "PRECISION": tiling.precision,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        # Both KL kernels must round a logit alike; fused into a difference it is not rounded.
        "enable_fp_fusion": False,
    }
