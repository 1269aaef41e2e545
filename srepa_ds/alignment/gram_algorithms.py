"""Exact ways to sum a structural loss over token pairs, each with its gradient formed by hand.

Every algorithm takes unit tokens and returns a `PairSum`. None but `*_dense` holds a whole N x N
matrix, and none leaves anything for autograd to remember. Formulas: sREPA Eq. 6-8; the diagonal (a
token with itself) never takes part.
"""

from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of a Gram matrix worked on at a time; of products, the half that is not yet known.
BLOCK = 128


class PairSum(NamedTuple):
    """A float64 sum over images and pairs, and its gradient with respect to the unit student."""

    value: Float[Tensor, ""]
    gradient: Float[Tensor, "batch tokens d_student"] | None


class Temperatures(NamedTuple):
    """The softmax temperatures of student and teacher rows."""

    student: float
    teacher: float


def mse_dense(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
) -> PairSum:
    """Returns the sum of (S^S_ij - S^T_ij)^2 over i != j from whole Gram matrices (Eq. 6)."""
    difference = _gram(student, minus=teacher)
    _diagonal(difference, 0).zero_()
    value = _sum_of_squares(difference)
    return PairSum(value, difference.mul_(4) @ student if with_gradient else None)


def mse_tiled(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    tile: int,
) -> PairSum:
    """Returns the same sum from `tile` rows at a time, right of the diagonal only.

    The difference of two Gram matrices is symmetric: each block beside the diagonal counts twice
    and serves the gradient of its rows and, transposed, of its columns.
    """
    value = student.new_zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(student) if with_gradient else None
    for start in range(0, student.shape[1], tile):
        rows, right = slice(start, start + tile), slice(start, None)
        difference = student[:, rows] @ student[:, right].mT
        difference.baddbmm_(teacher[:, rows], teacher[:, right].mT, alpha=-1)
        _diagonal(difference, 0).zero_()
        beside = difference[:, :, tile:]
        value += _sum_of_squares(difference) + _sum_of_squares(beside)
        if gradient is not None:
            gradient[:, rows].baddbmm_(difference, student[:, right], alpha=4)
            gradient[:, start + tile :].baddbmm_(beside.mT, student[:, rows], alpha=4)
    return PairSum(value, gradient)


def mse_feature(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
) -> PairSum:
    """Returns the same sum from width x width products, at a cost linear in the tokens.

    ||SS' - TT'||^2 = ||S'S||^2 + ||T'T||^2 - 2 ||S'T||^2, less the diagonal (|s|^2 - |t|^2)^2,
    which is not zero where only one of two tokens is. The terms cancel, so they are summed in
    float64.
    """
    dtype = student.dtype
    if student.shape[1] < max(student.shape[2], teacher.shape[2]):
        # With few tokens the diagonal is most of each term, and float32 products lose the rest.
        student, teacher = student.double(), teacher.double()
    student_gram = _gram(student.mT)
    teacher_student = teacher.mT @ student
    surplus = _square_norms(student) - _square_norms(teacher)
    added = partial(_sum_of_squares, within_rows=torch.float64)
    value = added(student_gram) + added(_gram(teacher.mT))
    value -= 2 * added(teacher_student) + added(surplus)
    # Rounding may carry a difference of nearly equal sums below zero.
    value = value.clamp_min(0)
    if not with_gradient:
        return PairSum(value, None)
    gradient = student * (-4 * surplus)
    gradient.baddbmm_(student, student_gram, alpha=4)
    gradient.baddbmm_(teacher, teacher_student, alpha=-4)
    return PairSum(value, gradient.to(dtype))


def mse_triton(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
) -> PairSum:
    """Returns the same sum from fused kernels, which write no part of a Gram matrix to memory.

    Raises ValueError where the kernels cannot run.
    """
    kernels = _triton_kernels(student.device)
    return kernels.mse_triton(student, teacher, with_gradient=with_gradient)


def kl_dense(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the sum over rows i of KL(P^T_i || P^S_i) from whole Gram matrices (Eq. 7-8)."""
    student_logits = _gram(student).div_(temperatures.student)
    teacher_logits = _gram(teacher).div_(temperatures.teacher)
    value = student.new_zeros((), dtype=torch.float64)
    for start in range(0, student.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        row_sum, excess = _divergence(student_logits[:, rows], teacher_logits[:, rows], start=start)
        value += row_sum
        student_logits[:, rows] = excess
    if not with_gradient:
        return PairSum(value, None)
    del teacher_logits
    both = _add_transpose(student_logits).div_(temperatures.student)
    return PairSum(value, both @ student)


def kl_tiled(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    tile: int,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the same sum from `tile` rows at a time, each row against all columns.

    With E = P^S - P^T the gradient is (E + E') S / tau_student.
    """
    value = student.new_zeros((), dtype=torch.float64)
    gradient = torch.zeros_like(student) if with_gradient else None
    outward = 1 / temperatures.student
    for start in range(0, student.shape[1], tile):
        rows = slice(start, start + tile)
        student_logits = (student[:, rows] / temperatures.student) @ student.mT
        teacher_logits = (teacher[:, rows] / temperatures.teacher) @ teacher.mT
        row_sum, excess = _divergence(student_logits, teacher_logits, start=start)
        value += row_sum
        if gradient is not None:
            gradient[:, rows].baddbmm_(excess, student, alpha=outward)
            gradient.baddbmm_(excess.mT, student[:, rows], alpha=outward)
    return PairSum(value, gradient)


def kl_triton(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the same sum from fused kernels with an online softmax; see `mse_triton`."""
    kernels = _triton_kernels(student.device)
    return kernels.kl_triton(
        student, teacher, with_gradient=with_gradient, temperatures=temperatures
    )


def _triton_kernels(device: torch.device) -> ModuleType:
    from srepa_ds.alignment import gram_triton

    reason = gram_triton.unavailable(device)
    if reason:
        raise ValueError(f"algorithm 'triton' cannot run here: {reason}; 'auto' runs anywhere")
    return gram_triton


def _divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, start: int
) -> tuple[Tensor, Tensor]:
    """Returns the sum of KL over these rows and P^S - P^T; row 0 is the token `start`.

    The logits are used up.
    """
    for logits in (student_logits, teacher_logits):
        _diagonal(logits, start).fill_(-torch.inf)
    log_student = torch.log_softmax(student_logits, -1)
    log_teacher = torch.log_softmax(teacher_logits, -1)
    teacher_rows = torch.exp(log_teacher, out=teacher_logits)
    # The diagonal holds -inf twice, whose difference would be NaN.
    _diagonal(log_student, start).zero_()
    _diagonal(log_teacher, start).zero_()
    pointwise = log_teacher.sub_(log_student).mul_(teacher_rows)
    value = pointwise.sum(-1).sum(dtype=torch.float64)
    excess = log_student.exp_().sub_(teacher_rows)
    _diagonal(excess, start).zero_()
    return value, excess


def _gram(tokens: Tensor, *, minus: Tensor | None = None) -> Tensor:
    """Returns tokens tokens', less minus minus' if given; each pair of tokens is computed once."""
    size = tokens.shape[1]
    gram = tokens.new_empty(len(tokens), size, size)
    for start in range(0, size, BLOCK):
        rows, right = slice(start, start + BLOCK), slice(start, None)
        block = tokens[:, rows] @ tokens[:, right].mT
        if minus is not None:
            block.baddbmm_(minus[:, rows], minus[:, right].mT, alpha=-1)
        gram[:, rows, right] = block
        gram[:, start + BLOCK :, rows] = block[:, :, BLOCK:].mT
    return gram


def _add_transpose(matrices: Tensor) -> Tensor:
    """Returns matrices + their transposes, in place."""
    for start in range(0, matrices.shape[1], BLOCK):
        rows, right = slice(start, start + BLOCK), slice(start, None)
        block = matrices[:, rows, right] + matrices[:, right, rows].mT
        matrices[:, rows, right] = block
        matrices[:, right, rows] = block.mT
    return matrices


def _diagonal(rows: Tensor, offset: int) -> Tensor:
    """Returns a view of the elements where a row meets its own token, `offset` columns in."""
    return rows.diagonal(offset=offset, dim1=-2, dim2=-1)


def _square_norms(tokens: Tensor) -> Tensor:
    return torch.linalg.vecdot(tokens, tokens).unsqueeze(-1)


def _sum_of_squares(rows: Tensor, *, within_rows: torch.dtype | None = None) -> Tensor:
    """Returns a float64 sum; a row is reduced in its own dtype unless told otherwise.

    That needs no wide copy.
    """
    return torch.linalg.vector_norm(rows, dim=-1, dtype=within_rows).double().square().sum()
