"""The configured alignment losses: which terms a run has, and their values for one teacher."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from srepa_ds.alignment.gram import (
    ALGORITHMS,
    DEFAULT_TILE,
    EPSILON,
    Reduction,
    check_token_grids,
    compute_dtype,
    structural_kl,
    structural_mse,
)
from srepa_ds.alignment.projector import ProjectorConfig
from srepa_ds.alignment.teachers import TeacherConfig
from srepa_ds.errors import nearest
from srepa_ds.schema import Section


class PointwiseConfig(Section):
    """The point-wise term: each projected token against its own teacher token (REPA)."""

    weight: float = Field(ge=0)
    """Factor of the term in the total loss; REPA 0.5, sREPA 1.0."""


class StructuralConfig(Section):
    """The structural term: similarities between tokens against the teacher's (sREPA)."""

    kind: Literal["mse", "kl"]
    """`mse` compares Gram matrices element by element, `kl` their softmax rows."""

    weight: float = Field(ge=0)
    """Factor of the term in the total loss; the paper's defaults are mse 2.0 and kl 0.5."""

    algorithm: str = "auto"
    """How it is computed: auto, dense, tiled, or (mse only) feature. All of them are exact."""

    tile: int = Field(default=DEFAULT_TILE, ge=1)
    """Rows worked on at a time by the tiled algorithm; it changes speed and memory only."""

    tau_student: float = Field(default=0.2, gt=0)
    """Softmax temperature of the student's rows (kl only)."""

    tau_teacher: float = Field(default=0.2, gt=0)
    """Softmax temperature of the teacher's rows (kl only)."""

    reduction: Reduction = "token_mean"
    """Mean of kl over tokens (token_mean, Eq. 8) or their sum (batch_mean, Algorithm 1)."""

    @model_validator(mode="after")
    def _algorithm_exists(self) -> "StructuralConfig":
        kl_only = ("tau_student", "tau_teacher", "reduction")
        defaults = {name: type(self).model_fields[name].default for name in kl_only}
        if self.kind == "mse" and any(getattr(self, n) != d for n, d in defaults.items()):
            raise ValueError(f"{', '.join(kl_only)} belong to kl; mse has neither")
        known = ["auto", *ALGORITHMS[self.kind]]
        if self.algorithm in known:
            return self
        if any(self.algorithm in table for table in ALGORITHMS.values()):
            choice = f"choose one of {', '.join(known)}"
            raise ValueError(f"algorithm '{self.algorithm}' cannot compute {self.kind}; {choice}")
        raise ValueError(f"unknown algorithm '{self.algorithm}'; {nearest(self.algorithm, known)}")


class AlignmentConfig(Section):
    """The alignment of one block of the model with one teacher."""

    teacher: TeacherConfig
    """Whose tokens are the target."""

    depth: int = Field(ge=1)
    """The block whose output is aligned, counted from 1; the paper: 4 for B, 8 for L and XL."""

    projector: ProjectorConfig = ProjectorConfig()
    """The trained map from the model's width to the teacher's."""

    pointwise: PointwiseConfig | None = None
    """The point-wise term, or null for none."""

    structural: StructuralConfig | None = None
    """The structural term, or null for none."""

    @model_validator(mode="after")
    def _has_a_term(self) -> "AlignmentConfig":
        if self.pointwise is None and self.structural is None:
            raise ValueError(
                "an alignment needs a pointwise or a structural term; "
                "to train without alignment, leave it out of the list"
            )
        return self

    @property
    def pointwise_weight(self) -> float:
        """The factor of the point-wise term, 0 where it is absent."""
        return self.pointwise.weight if self.pointwise else 0.0

    @property
    def structural_weight(self) -> float:
        """The factor of the structural term, 0 where it is absent."""
        return self.structural.weight if self.structural else 0.0


class AlignmentLosses(NamedTuple):
    """The terms of one teacher before their weights; exactly zero where a term is absent."""

    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]


def alignment_losses(
    config: AlignmentConfig,
    projected: Float[Tensor, "batch tokens d_student"],
    teacher_patches: Float[Tensor, "batch tokens d_teacher"],
) -> AlignmentLosses:
    """Returns the terms of `config` on projected student tokens, at least float32.

    Both terms see the projected tokens (sREPA Algorithm 1). Raises ValueError for token counts
    that differ.
    """
    absent = projected.new_zeros((), dtype=compute_dtype(projected, teacher_patches))
    pointwise, structural = config.pointwise, config.structural
    return AlignmentLosses(
        pointwise_cosine(projected, teacher_patches) if pointwise else absent,
        structural_loss(structural, projected, teacher_patches) if structural else absent,
    )


def structural_loss(
    config: StructuralConfig,
    student: Float[Tensor, "batch tokens d_student"],
    teacher: Float[Tensor, "batch tokens d_teacher"],
) -> Float[Tensor, ""]:
    """Returns the structural term that `config` describes, before its weight."""
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
