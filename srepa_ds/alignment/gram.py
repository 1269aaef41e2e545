"""Structural alignment losses: distances between the student's and the teacher's similarities.

One definition per loss, several exact algorithms for it. Similarities are of L2-normalised tokens,
products are at least float32 without TF32 whatever the surrounding autocast says, and the gradient
is formed in the forward pass: the one tensor saved for backward has the size of the student's
tokens, in bfloat16 where they are. The computation is one operator,
`torch.ops.srepa_ds.structural_loss`, opaque to `torch.compile` and nameable in a selective
checkpointing policy.
"""

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from srepa_ds.alignment.gram_algorithms.choice import (
    ALGORITHMS,
    image_groups,
    resolve_algorithm,
    working_set,
)
from srepa_ds.alignment.gram_algorithms.parts import Temperatures, compute_dtype
from srepa_ds.alignment.gram_algorithms.precision import full_precision

Reduction = Literal["token_mean", "batch_mean"]

DEFAULT_TILE = 256


def structural_mse(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    algorithm: str = "auto",
    tile: int = DEFAULT_TILE,
) -> Float[Tensor, ""]:
    """Returns the mean over images and pairs i != j of (S^S_ij - S^T_ij)^2 (sREPA Eq. 6).

    S is the Gram matrix of L2-normalised tokens; the widths may differ. Only the student gets a
    gradient. float64 if either input is, else float32. Raises ValueError for token counts that
    differ, fewer than two tokens, an unknown algorithm or a tile below 1.
    """
    _check(student, teacher, tile=tile)
    _, num_tokens, _ = student.shape
    algorithm = resolve_algorithm("mse", algorithm, student, teacher)
    scale = 1 / (len(student) * num_tokens * (num_tokens - 1))
    return _structural(student, teacher, "mse", algorithm, tile, Temperatures(1, 1), scale)


def structural_kl(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
    *,
    tau_student: float = 0.2,
    tau_teacher: float = 0.2,
    reduction: Reduction = "token_mean",
    algorithm: str = "auto",
    tile: int = DEFAULT_TILE,
) -> Float[Tensor, ""]:
    """Returns KL(P^T || P^S) of similarity rows, P = softmax over j != i of S/tau (sREPA Eq. 7-8).

    `token_mean` averages over images and tokens (Eq. 8); `batch_mean` over images only, which is
    the literal Algorithm 1 and exactly `tokens` times larger. Gradient, dtype and errors as in
    `structural_mse`; temperatures must be positive.
    """
    _check(student, teacher, tile=tile)
    if tau_student <= 0 or tau_teacher <= 0:
        raise ValueError(f"temperatures must be positive, got {tau_student} and {tau_teacher}")
    if reduction not in ("token_mean", "batch_mean"):
        raise ValueError(f"reduction must be 'token_mean' or 'batch_mean', got '{reduction}'")
    algorithm = resolve_algorithm("kl", algorithm, student, teacher)
    count = len(student) * (student.shape[1] if reduction == "token_mean" else 1)
    temperatures = Temperatures(tau_student, tau_teacher)
    return _structural(student, teacher, "kl", algorithm, tile, temperatures, 1 / count)


def check_token_grids(
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "teacher_batch teacher_tokens d_teacher"],
) -> None:
    """Raises ValueError unless both have the same number of images and of tokens."""
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"the student has {student.shape[1]} tokens of {student.shape[0]} images, the teacher "
            f"{teacher.shape[1]} of {teacher.shape[0]}; choose a teacher input size and a patch "
            "size that give the same grid"
        )


def _check(student: Tensor, teacher: Tensor, *, tile: int) -> None:
    check_token_grids(student, teacher)
    if len(student) < 1 or student.shape[1] < 2:
        raise ValueError(
            "a structural loss compares pairs of tokens of an image, so it needs at least one "
            f"image and two tokens; got {student.shape[1]} tokens of {len(student)} images"
        )
    if tile < 1:
        raise ValueError(f"tile must be at least 1 row, got {tile}")


def _structural(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    algorithm: str,
    tile: int,
    temperatures: Temperatures,
    scale: float,
) -> Tensor:
    with_gradient = student.requires_grad and torch.is_grad_enabled()
    loss, _ = torch.ops.srepa_ds.structural_loss(
        student, teacher.detach(), kind, algorithm, tile, *temperatures, scale, with_gradient
    )
    return loss


# Defined by hand: `torch.library.custom_op` would import Dynamo, four seconds, at the first call.
_OPERATOR = "srepa_ds::structural_loss"
torch.library.define(
    _OPERATOR,
    "(Tensor student, Tensor teacher, str kind, str algorithm, int tile, float tau_student, "
    "float tau_teacher, float scale, bool with_gradient) -> (Tensor, Tensor)",
)


@torch.library.impl(_OPERATOR, "default")
def _structural_loss(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    algorithm: str,
    tile: int,
    tau_student: float,
    tau_teacher: float,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale": scale}
    if algorithm == "tiled":
        options["tile"] = tile
    if kind == "kl":
        options["temperatures"] = Temperatures(tau_student, tau_teacher)
    compute = partial(ALGORITHMS[kind][algorithm], **options)
    loss = student.new_zeros((), dtype=torch.float64)
    gradient = _space_for_gradient(student, teacher, with_gradient)
    with full_precision(student.device.type):
        for images in image_groups(student, teacher, kind=kind, algorithm=algorithm, tile=tile):
            target = gradient[images] if with_gradient else None
            loss += compute(student[images], teacher[images], gradient=target)
    return (loss * scale).to(compute_dtype(student, teacher)), gradient


def _space_for_gradient(student: Tensor, teacher: Tensor, with_gradient: bool) -> Tensor:
    """Returns an empty gradient: bfloat16 for a bfloat16 student, else at least float32.

    float16 lacks the range for a gradient before its scaling.
    """
    narrow = student.dtype == torch.bfloat16
    dtype = student.dtype if narrow else compute_dtype(student, teacher)
    return student.new_empty(student.shape if with_gradient else (0,), dtype=dtype)


@torch.library.register_fake(_OPERATOR)
def _(student, teacher, kind, algorithm, tile, tau_student, tau_teacher, scale, with_gradient):
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    return loss, _space_for_gradient(student, teacher, with_gradient)


def _remember(ctx, inputs, output) -> None:
    student, *_ = inputs
    _, gradient = output
    ctx.set_materialize_grads(False)
    ctx.student_dtype = student.dtype
    ctx.save_for_backward(gradient)


def _backward(ctx, loss_gradient, gradient_gradient):
    if gradient_gradient is not None:
        raise RuntimeError("structural losses are differentiable once, not twice")
    (gradient,) = ctx.saved_tensors
    outward = None
    if loss_gradient is not None:
        outward = _scaled(gradient, loss_gradient).to(ctx.student_dtype)
    return outward, None, None, None, None, None, None, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Returns gradient * factor, rounded once, in place if the graph is not kept.

    For bfloat16 this is the second rounding: at most 2^-7 + 2^-16 of a component in all.
    """
    # With a dimension: a number without one would be rounded to the gradient's dtype first.
    factor = factor.reshape(1, 1, 1)
    # torch's own compiled graphs ask the same before they overwrite a saved tensor.
    if torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * factor).to(gradient.dtype)
    # A few images at a time: where dtypes differ, CPUs make wide copies.
    for part in gradient.split(max(1, working_set(gradient) // gradient[0].numel())):
        torch.mul(part, factor, out=part)
    return gradient


torch.library.register_autograd(_OPERATOR, _backward, setup_context=_remember)
