"""Exact ways to sum the divergences of two softmaxed Gram matrices (sREPA Eq. 7-8), with gradient.

The diagonal, a token with itself, never takes part. Gradients are formed by hand.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.alignment.gram_algorithms.parts import BLOCK, PairSum, Temperatures, diagonal, gram


def kl_dense(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the sum over rows i of KL(P^T_i || P^S_i) from whole Gram matrices (Eq. 7-8)."""
    student_logits = gram(student).div_(temperatures.student)
    teacher_logits = gram(teacher).div_(temperatures.teacher)
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


def _divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, start: int
) -> tuple[Tensor, Tensor]:
    """Returns the sum of KL over these rows and P^S - P^T; row 0 is the token `start`.

    The logits are used up.
    """
    for logits in (student_logits, teacher_logits):
        diagonal(logits, start).fill_(-torch.inf)
    log_student = torch.log_softmax(student_logits, -1)
    log_teacher = torch.log_softmax(teacher_logits, -1)
    teacher_rows = torch.exp(log_teacher, out=teacher_logits)
    # The diagonal holds -inf twice, whose difference would be NaN.
    diagonal(log_student, start).zero_()
    diagonal(log_teacher, start).zero_()
    pointwise = log_teacher.sub_(log_student).mul_(teacher_rows)
    value = pointwise.sum(-1).sum(dtype=torch.float64)
    excess = log_student.exp_().sub_(teacher_rows)
    diagonal(excess, start).zero_()
    return value, excess


def _add_transpose(matrices: Tensor) -> Tensor:
    """Returns matrices + their transposes, in place."""
    for start in range(0, matrices.shape[1], BLOCK):
        rows, right = slice(start, start + BLOCK), slice(start, None)
        block = matrices[:, rows, right] + matrices[:, right, rows].mT
        matrices[:, rows, right] = block
        matrices[:, right, rows] = block.mT
    return matrices
