"""The alignment of one block of the model with one teacher: its settings and its losses."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from srepa_ds.alignment.gram_algorithms.parts import compute_dtype
from srepa_ds.alignment.losses import (
    PointwiseConfig,
    StructuralConfig,
    pointwise_cosine,
    structural_loss,
)
from srepa_ds.alignment.projector import ProjectorConfig, build_projector
from srepa_ds.alignment.schedule import weight_factor
from srepa_ds.alignment.tokens import (
    Grid,
    ResamplingConfig,
    SpatialNormConfig,
    resampled,
    spatially_normalised,
)
from srepa_ds.encoders.teacher import TeacherConfig, TeacherTokens
from srepa_ds.schema import Section


class AlignmentLosses(NamedTuple):
    """The terms of one teacher before their weights; a term that is absent or over is zero."""

    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]


class TermWeights(NamedTuple):
    """The factors of an alignment's terms in the total loss at one optimizer step.

    None for a term that is absent or over; 0.0 for one that is only measured. Python
    numbers, not tensors, so that a term that is over costs nothing.
    """

    pointwise: float | None
    structural: float | None

    @property
    def are_over(self) -> bool:
        """Whether no term is left; with REG the model still needs the teacher's class token."""
        return self.pointwise is None and self.structural is None

    def total(self, losses: AlignmentLosses) -> Float[Tensor, ""]:
        """Returns the weighted sum of the terms."""
        # A term that is over is multiplied, not left out: it may carry the projector's zeros.
        pointwise = (self.pointwise or 0.0) * losses.pointwise
        return pointwise + (self.structural or 0.0) * losses.structural


class AlignmentConfig(Section):
    """The alignment of one block of the model with one teacher."""

    teacher: TeacherConfig
    """The encoder whose tokens are the target."""

    depth: int = Field(ge=1)
    """The block whose output is aligned, counted from 1; the paper: 4 for B, 8 for L and XL."""

    projector: ProjectorConfig = ProjectorConfig()
    """The trained map from the model's width to the teacher's."""

    stored_tokens: Literal["bf16", "int8"] | None = None
    """Take the teacher's tokens from the data folder, where `srepa-ds prepare --teacher` put them
    (`bf16`, or `int8` with a scale per token); null: the teacher runs in training."""

    spatial_norm: SpatialNormConfig | None = None
    """Normalisation of the teacher's patch tokens over the image (iREPA), or null for none."""

    resampling: ResamplingConfig | None = None
    """How to match the teacher's grid of tokens to the model's; null: the grids must be equal."""

    pointwise: PointwiseConfig | None = None
    """The point-wise term, or null for none."""

    structural: StructuralConfig | None = None
    """The structural term, or null for none."""

    @model_validator(mode="after")
    def _terms_fit(self) -> "AlignmentConfig":
        if self.pointwise is None and self.structural is None:
            raise ValueError(
                "an alignment needs a pointwise or a structural term; "
                "to train without alignment, leave it out of the list"
            )
        if self.projects_cls and self.projector.kind == "conv":
            raise ValueError(
                "the conv projector works on the grid of patches, where the class token has no "
                "place; set include_cls=false or choose the mlp projector"
            )
        return self

    @property
    def has_projector(self) -> bool:
        """Whether any term sees projected tokens."""
        structural = self.structural is not None and self.structural.tokens == "projected"
        return self.pointwise is not None or structural

    @property
    def projects_cls(self) -> bool:
        """Whether any term compares the projected class token."""
        structural = self.structural
        return (self.pointwise is not None and self.pointwise.include_cls) or (
            structural is not None and structural.tokens == "projected" and structural.include_cls
        )

    @property
    def includes_cls(self) -> bool:
        """Whether any term compares class tokens, projected or not."""
        return any(term.include_cls for term in (self.pointwise, self.structural) if term)

    def weights_at(self, step: int) -> TermWeights:
        """Returns weight times schedule of both terms at optimizer step `step` (from 0).

        A weight configured as 0 does not end its term, which is still measured.
        """
        return TermWeights(_weight_at(self.pointwise, step), _weight_at(self.structural, step))


def _weight_at(term: PointwiseConfig | StructuralConfig | None, step: int) -> float | None:
    factor = weight_factor(term.schedule, step) if term else 0.0
    return factor * term.weight if term and factor else None


class TeacherShape(NamedTuple):
    """The sizes of a teacher's output that the model is built for."""

    width: int
    grid: Grid


class _Side(NamedTuple):
    """The tokens of the student or of the teacher."""

    patches: Tensor
    cls: Tensor | None


@dataclass(frozen=True)
class Alignment:
    """One alignment at work between the token grids of the model and of a teacher.

    It holds no weights: as a submodule's, the projector's weights would lose the names
    `projectors.<i>...` that checkpoints and exports use. `Objective` owns the projectors.
    """

    config: AlignmentConfig
    grid: Grid
    """The grid of the model's patch tokens."""
    teacher: TeacherShape

    def new_projector(self, hidden_size: int, generator: torch.Generator | None) -> nn.Module:
        """Returns the configured projector; one without weights if no term needs any."""
        if not self.config.has_projector:
            return nn.Identity()
        return build_projector(
            self.config.projector, hidden_size, self.teacher.width, generator, grid=self.grid
        )

    def __call__(
        self,
        projector: nn.Module,
        hidden: Float[Tensor, "batch student_tokens d_hidden"],
        teacher: TeacherTokens | None,
        weights: TermWeights,
    ) -> AlignmentLosses:
        """Returns the terms for the model's states `hidden`, before their weights.

        At least float32. A term that is over is not computed; `teacher` is read only if one is
        left. The patch tokens come last in `hidden`; a token before them is the class token. Raises
        ValueError for token counts that do not fit.
        """
        if weights.are_over:
            return self._idle(projector, hidden)
        assert teacher is not None
        pointwise = None if weights.pointwise is None else self.config.pointwise
        structural = None if weights.structural is None else self.config.structural
        spaces = {"projected"} if pointwise else set()
        spaces |= {structural.tokens} if structural else set()
        if "projected" in spaces:
            zero = hidden.new_zeros((), dtype=compute_dtype(hidden, teacher.patches))
            losses = AlignmentLosses(zero, zero)
        else:
            losses = self._idle(projector, hidden)
        target = self.target(teacher)
        student = {space: self._student(projector, hidden, space) for space in sorted(spaces)}
        if pointwise is not None:
            sides = _sequences(student["projected"], target, include_cls=pointwise.include_cls)
            losses = losses._replace(pointwise=pointwise_cosine(*sides))
        if structural is not None:
            own = student[structural.tokens]
            sides = _sequences(own, target, include_cls=structural.include_cls)
            losses = losses._replace(structural=structural_loss(structural, *sides))
        return losses

    def target(self, teacher: TeacherTokens) -> TeacherTokens:
        """Returns the teacher's tokens, normalised and then brought to the common grid."""
        patches, resampling = teacher.patches, self.config.resampling
        if self.config.spatial_norm is not None:
            patches = spatially_normalised(patches, gamma=self.config.spatial_norm.gamma)
        if resampling is not None and resampling.direction == "teacher_to_student":
            patches = resampled(patches, self.teacher.grid, self.grid, mode=resampling.mode)
        return TeacherTokens(patches, teacher.cls)

    def student_patches(
        self, patch_tokens: Float[Tensor, "batch student_tokens width"]
    ) -> Float[Tensor, "batch compared_tokens width"]:
        """Returns the student's patch tokens, projected or not, on the common grid."""
        resampling = self.config.resampling
        if resampling is None or resampling.direction == "teacher_to_student":
            return patch_tokens
        return resampled(patch_tokens, self.grid, self.teacher.grid, mode=resampling.mode)

    def _idle(self, projector: nn.Module, hidden: Tensor) -> AlignmentLosses:
        """Returns zeros for an alignment that is over, with zero gradients for its projector.

        ZeRO relies on every trained weight taking part in every step on every rank; one image is
        enough for that.
        """
        zero = hidden.new_zeros((), dtype=compute_dtype(hidden, hidden))
        if not self.config.has_projector:
            return AlignmentLosses(zero, zero)
        projected = self._projected(projector, hidden[:1].detach()).patches
        return AlignmentLosses(projected.sum().to(zero.dtype) * 0, zero)

    def _student(self, projector: nn.Module, hidden: Tensor, space: str) -> _Side:
        """Returns the student's tokens as the terms of a space see them, on the common grid."""
        projects = space == "projected"
        side = self._projected(projector, hidden) if projects else self._split(hidden)
        return side._replace(patches=self.student_patches(side.patches))

    def _projected(self, projector: nn.Module, hidden: Tensor) -> _Side:
        states = self._split(hidden)
        if not self.config.projects_cls:
            return _Side(projector(states.patches), None)
        if states.cls is None:
            raise ValueError("include_cls needs a model that carries a class token")
        projected = projector(hidden)
        return _Side(projected[:, 1:], projected[:, 0])

    def _split(self, hidden: Tensor) -> _Side:
        """Returns the model's patch tokens and, where it carries one, its class token."""
        num_prefix = hidden.shape[1] - self.grid[0] * self.grid[1]
        if num_prefix not in (0, 1):
            raise ValueError(
                f"{hidden.shape[1]} tokens do not fill the grid {self.grid}, with or without a "
                "class token"
            )
        return _Side(hidden[:, num_prefix:], hidden[:, 0] if num_prefix else None)


def _sequences(
    student: _Side, target: TeacherTokens, *, include_cls: bool
) -> tuple[Tensor, Tensor]:
    """Returns the patch tokens of both sides, after their class tokens if these are included."""
    if not include_cls:
        return student.patches, target.patches
    if student.cls is None or target.cls is None:
        raise ValueError("include_cls needs a class token of the model and of the teacher")
    sides = ((student.patches, student.cls), (target.patches, target.cls))
    first, second = (torch.cat((cls[:, None].to(p.dtype), p), dim=1) for p, cls in sides)
    return first, second
