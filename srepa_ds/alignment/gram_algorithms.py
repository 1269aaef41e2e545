"""Exact ways to sum a structural loss over token pairs, each with its gradient formed by hand.

Every algorithm takes unit tokens and returns a `PairSum`. None but `*_dense` holds a whole N x N
matrix, and none leaves anything for autograd to remember. Formulas: sREPA Eq. 6-8; the diagonal (a
token with itself) never takes part.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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
    difference = torch.baddbmm(student @ student.mT, teacher, teacher.mT, alpha=-1)
    _diagonal(difference, 0).zero_()
    value = _sum_of_squares(difference)
    return PairSum(value, 4 * (difference @ student) if with_gradient else None)


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
            gradient[:, rows].baddbmm_(difference, student[:, right])
            gradient[:, start + tile :].baddbmm_(beside.mT, student[:, rows])
    return PairSum(value, None if gradient is None else gradient.mul_(4))


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
    student_gram = student.mT @ student
    teacher_student = teacher.mT @ student
    surplus = student.square().sum(-1, keepdim=True) - teacher.square().sum(-1, keepdim=True)
    value = (
        _sum_of_squares(student_gram)
        + _sum_of_squares(teacher.mT @ teacher)
        - 2 * _sum_of_squares(teacher_student)
        - _sum_of_squares(surplus)
    )
    # Rounding may carry a difference of nearly equal sums below zero.
    value = value.clamp_min(0)
    if not with_gradient:
        return PairSum(value, None)
    gradient = (student * surplus).neg_()
    gradient.baddbmm_(student, student_gram).baddbmm_(teacher, teacher_student, alpha=-1)
    return PairSum(value, gradient.mul_(4).to(dtype))


def kl_dense(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    with_gradient: bool,
    temperatures: Temperatures,
) -> PairSum:
    """Returns the sum over rows i of KL(P^T_i || P^S_i) from whole Gram matrices (Eq. 7-8)."""
    return kl_tiled(
        student,
        teacher,
        with_gradient=with_gradient,
        tile=student.shape[1],
        temperatures=temperatures,
    )


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
    for start in range(0, student.shape[1], tile):
        rows = slice(start, start + tile)
        log_student = _log_softmax_rows(student, rows, temperatures.student)
        log_teacher = _log_softmax_rows(teacher, rows, temperatures.teacher)
        teacher_rows = log_teacher.exp()
        # The diagonal holds -inf twice, whose difference would be NaN.
        _diagonal(log_student, start).zero_()
        _diagonal(log_teacher, start).zero_()
        pointwise = log_teacher.sub_(log_student).mul_(teacher_rows)
        value += pointwise.sum(-1).sum(dtype=torch.float64)
        if gradient is not None:
            excess = log_student.exp_().sub_(teacher_rows)
            _diagonal(excess, start).zero_()
            gradient[:, rows].baddbmm_(excess, student)
            gradient.baddbmm_(excess.mT, student[:, rows])
    return PairSum(value, None if gradient is None else gradient.div_(temperatures.student))


def _log_softmax_rows(tokens: Tensor, rows: slice, temperature: float) -> Tensor:
    """Returns log P of some rows of the Gram matrix, with -inf on the diagonal."""
    logits = (tokens[:, rows] @ tokens.mT).div_(temperature)
    _diagonal(logits, rows.start).fill_(-torch.inf)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _diagonal(rows: Tensor, offset: int) -> Tensor:
    """Returns a view of the elements where a row meets its own token, `offset` columns in."""
    return rows.diagonal(offset=offset, dim1=-2, dim2=-1)


def _sum_of_squares(rows: Tensor) -> Tensor:
    """Returns a float64 sum; rows are reduced in their own dtype, which needs no wide copy."""
    return torch.linalg.vector_norm(rows, dim=-1).double().square().sum()
