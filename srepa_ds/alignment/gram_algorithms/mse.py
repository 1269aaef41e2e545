"""Exact ways to sum the squared differences of two Gram matrices (sREPA Eq. 6), with gradient.

The diagonal, a token with itself, never takes part. Gradients are formed by hand.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.alignment.gram_algorithms.parts import (
    BLOCK,
    EPSILON,
    PairSum,
    compute_dtype,
    diagonal,
    gram,
    norms,
    sum_of_squares,
)


def mse_dense(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    scale: float,
    gradient: Float[Tensor, "batch tokens d_student"] | None,
) -> Float[Tensor, ""]:
    """Returns the float64 sum of D_ij^2 = (S^S_ij - S^T_ij)^2 over i != j (Eq. 6).

    Similarities are products of tokens, divided by both norms; each pair is computed once. The
    gradient is a product M s with the raw tokens, M_ij = 4 D_ij / (|s_i| |s_j|), where
    M_ii = -4 sum_j D_ij S^S_ij / |s_i|^2 removes the part that would change a norm. `scale` times
    it is written to `gradient`, if given. In float32 lengths must stay below 1e18.
    """
    student, teacher = _wide(student, teacher)
    norm = norms(student)
    inverse, teacher_inverse = _inverse(norm), _inverse(norms(teacher))
    value = student.new_zeros((), dtype=torch.float64)
    size = student.shape[1]
    matrix = student.new_empty(len(student), size, size) if gradient is not None else None
    along = torch.zeros_like(inverse)
    for start in range(0, size, BLOCK):
        rows, right, below = slice(start, start + BLOCK), slice(start, None), start + BLOCK
        similarity = _divided(student[:, rows] @ student[:, right].mT, inverse, start)
        difference = _divided(teacher[:, rows] @ teacher[:, right].mT, teacher_inverse, start)
        torch.sub(similarity, difference, out=difference)
        diagonal(difference, 0).zero_()
        value += sum_of_squares(difference) + sum_of_squares(difference[:, :, BLOCK:])
        if matrix is not None:
            similarity *= difference
            along[:, rows] += similarity.sum(-1, keepdim=True)
            along[:, below:] += similarity[:, :, BLOCK:].sum(-2).unsqueeze(-1)
            matrix[:, rows, right] = _divided(difference, inverse, start)
            matrix[:, below:, rows] = difference[:, :, BLOCK:].mT
    if gradient is not None and matrix is not None:
        # Below the clamp the denominator is a constant and nothing is removed.
        along.masked_fill_(norm < EPSILON, 0)
        diagonal(matrix, 0).copy_((along * inverse.square()).squeeze(-1).neg_())
        _multiply_into(gradient, matrix.mul_(4 * scale), student)
    return value


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
        diagonal(difference, 0).zero_()
        beside = difference[:, :, tile:]
        value += sum_of_squares(difference) + sum_of_squares(beside)
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
    student_gram = gram(student.mT)
    teacher_student = teacher.mT @ student
    surplus = _square_norms(student) - _square_norms(teacher)
    added = partial(sum_of_squares, within_rows=torch.float64)
    value = added(student_gram) + added(gram(teacher.mT))
    value -= 2 * added(teacher_student) + added(surplus)
    # Rounding may carry a difference of nearly equal sums below zero.
    value = value.clamp_min(0)
    if not with_gradient:
        return PairSum(value, None)
    gradient = student * (-4 * surplus)
    gradient.baddbmm_(student, student_gram, alpha=4)
    gradient.baddbmm_(teacher, teacher_student, alpha=-4)
    return PairSum(value, gradient.to(dtype))


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def _inverse(norm: Tensor) -> Tensor:
    return norm.clamp_min(EPSILON).reciprocal_()


def _divided(products: Tensor, inverse: Tensor, start: int) -> Tensor:
    """Returns products of tokens, row 0 and column 0 of the token `start`, over their norms."""
    rows, columns = inverse[:, start : start + products.shape[1]], inverse[:, start:].mT
    return products.mul_(rows).mul_(columns)


def _multiply_into(target: Tensor, matrices: Tensor, tokens: Tensor) -> None:
    if target.dtype == tokens.dtype:
        torch.bmm(matrices, tokens, out=target)
    else:
        target.copy_(matrices @ tokens)


def _square_norms(tokens: Tensor) -> Tensor:
    return torch.linalg.vecdot(tokens, tokens).unsqueeze(-1)
