"""Parts shared by the algorithms of the structural losses: unit tokens, Gram matrices, sums.

None of them saves anything for autograd.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Rows of a Gram matrix computed at a time; of each product only the half that is not yet known.
BLOCK = 128

EPSILON = 1e-12
"""The smallest norm a token is divided by, so that a zero vector stays zero."""


class PairSum(NamedTuple):
    """A float64 sum over images and pairs, and its gradient with respect to the unit student."""

    value: Float[Tensor, ""]
    gradient: Float[Tensor, "batch tokens d_student"] | None


class Temperatures(NamedTuple):
    """The softmax temperatures of student and teacher rows."""

    student: float
    teacher: float


def on_unit_tokens(
    compute: Callable[..., PairSum],
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    scale: float,
    gradient: Float[Tensor, "batch tokens d_student"] | None,
    **options: Any,
) -> Float[Tensor, ""]:
    """Returns the float64 sum `compute` gives for the unit tokens x / max(|x|, 1e-12).

    `scale` times its gradient with respect to `student` is written to `gradient`, if given.
    """
    dtype = compute_dtype(student, teacher)
    unit_student, norm = _unit(student.to(dtype))
    unit_teacher, _ = _unit(teacher.to(dtype))
    result = compute(unit_student, unit_teacher, with_gradient=gradient is not None, **options)
    if gradient is not None:
        outward = result.gradient
        assert outward is not None
        along = torch.linalg.vecdot(unit_student, outward).unsqueeze(-1)
        # Below the clamp the denominator is a constant and nothing is projected out.
        along.masked_fill_(norm < EPSILON, 0)
        outward.addcmul_(unit_student, along, value=-1)
        torch.mul(outward, scale / norm.clamp_min(EPSILON), out=gradient)
    return result.value


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Returns the dtype losses are computed in: the wider of the two, at least float32."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return torch.promote_types(dtype, torch.float32)


def norms(tokens: Tensor) -> Tensor:
    """Returns the lengths of tokens, with a last dimension of one."""
    return torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)


def _unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    norm = norms(tokens)
    return tokens / norm.clamp_min(EPSILON), norm


def gram(tokens: Tensor) -> Tensor:
    """Returns tokens tokens'; each pair of tokens is computed once."""
    size = tokens.shape[1]
    gram = tokens.new_empty(len(tokens), size, size)
    for start in range(0, size, BLOCK):
        rows, right = slice(start, start + BLOCK), slice(start, None)
        block = tokens[:, rows] @ tokens[:, right].mT
        gram[:, rows, right] = block
        gram[:, start + BLOCK :, rows] = block[:, :, BLOCK:].mT
    return gram


def diagonal(rows: Tensor, offset: int) -> Tensor:
    """Returns a view of the diagonal that starts `offset` columns in: each token with itself."""
    return rows.diagonal(offset=offset, dim1=-2, dim2=-1)


def sum_of_squares(rows: Tensor, *, within_rows: torch.dtype | None = None) -> Tensor:
    """Returns a float64 sum; each row is reduced in `within_rows`, by default its own dtype.

    The default needs no wide copy.
    """
    return torch.linalg.vector_norm(rows, dim=-1, dtype=within_rows).double().square().sum()
