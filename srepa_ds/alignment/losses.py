"""The loss terms of an alignment: their settings, and their values on given tokens."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from srepa_ds.alignment.gram import (
    ALGORITHMS,
    DEFAULT_TILE,
    Reduction,
    check_token_grids,
    structural_kl,
    structural_mse,
)
from srepa_ds.alignment.gram_algorithms.parts import EPSILON, compute_dtype
from srepa_ds.alignment.schedule import ScheduleConfig
from srepa_ds.errors import nearest
from srepa_ds.schema import MayChange, OnlyFor, Section


class PointwiseConfig(Section):
    """The point-wise term: each projected token against its own teacher token (REPA)."""

    weight: float = Field(ge=0)
    """Factor of the term in the total loss; REPA 0.5, sREPA 1.0."""

    schedule: ScheduleConfig = ScheduleConfig()
    """How the factor follows the training step."""

    include_cls: bool = False
    """Whether the class token is compared as well (REG), where the model carries one."""


class StructuralConfig(Section):
    """The structural term: similarities between tokens against the teacher's (sREPA)."""

    kind: Literal["mse", "kl"]
    """`mse` compares Gram matrices element by element, `kl` their softmax rows."""

    weight: float = Field(ge=0)
    """Factor of the term in the total loss; the paper's defaults are mse 2.0 and kl 0.5."""

    schedule: ScheduleConfig = ScheduleConfig()
    """How the factor follows the training step."""

    tokens: Literal["projected", "hidden"] = "projected"
    """The student's side: `projected` tokens (the paper), or the `hidden` states themselves, whose
    width need not be the teacher's."""

    include_cls: bool = False
    """Whether the class token takes part in the Gram matrix, where the model carries one (REG)."""

    algorithm: Annotated[str, MayChange] = "auto"
    """The algorithm: auto, dense, tiled, triton, or (mse only) feature. All are exact."""

    tile: Annotated[int, MayChange] = Field(default=DEFAULT_TILE, ge=1)
    """Rows per block of the tiled algorithm; it changes speed and memory only."""

    tau_student: Annotated[float, OnlyFor("kind", "kl")] = Field(default=0.2, gt=0)
    """Softmax temperature of the student's rows (kl only)."""

    tau_teacher: Annotated[float, OnlyFor("kind", "kl")] = Field(default=0.2, gt=0)
    """Softmax temperature of the teacher's rows (kl only)."""

    reduction: Annotated[Reduction, OnlyFor("kind", "kl")] = "token_mean"
    """Mean of kl over tokens (token_mean, Eq. 8) or their sum (batch_mean, Algorithm 1)."""

    @model_validator(mode="after")
    def _algorithm_exists(self) -> "StructuralConfig":
        known = ["auto", *ALGORITHMS[self.kind]]
        if self.algorithm in known:
            return self
        if any(self.algorithm in table for table in ALGORITHMS.values()):
            choice = f"choose one of {', '.join(known)}"
            raise ValueError(f"algorithm '{self.algorithm}' cannot compute {self.kind}; {choice}")
        raise ValueError(f"unknown algorithm '{self.algorithm}'; {nearest(self.algorithm, known)}")


def structural_loss(
    config: StructuralConfig,
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
) -> Float[Tensor, ""]:
    """Returns the structural term configured by `config`, before its weight."""
    if config.kind == "mse":
        return structural_mse(student, teacher, algorithm=config.algorithm, tile=config.tile)
    return structural_kl(
        student,
        teacher,
        tau_student=config.tau_student,
        tau_teacher=config.tau_teacher,
        reduction=config.reduction,
        algorithm=config.algorithm,
        tile=config.tile,
    )


def pointwise_cosine(
    student: Float[Tensor, "batch tokens width"], teacher: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, ""]:
    """Returns -cos(student, teacher) averaged over images and tokens, in [-1, 1] (REPA's L_proj).

    Computed in at least float32; only the student gets a gradient. Raises ValueError for token
    counts or widths that differ.
    """
    check_token_grids(student, teacher)
    if student.shape[2] != teacher.shape[2]:
        raise ValueError(
            f"the point-wise loss needs tokens of the teacher's width {teacher.shape[2]}, "
            f"got {student.shape[2]}"
        )
    dtype = compute_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        unit_student = torch.nn.functional.normalize(student.to(dtype), dim=-1, eps=EPSILON)
        unit_teacher = torch.nn.functional.normalize(
            teacher.detach().to(dtype), dim=-1, eps=EPSILON
        )
        return -(unit_student * unit_teacher).sum(-1).mean()
