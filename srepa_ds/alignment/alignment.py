"""The alignment of one block of the model with one teacher: its settings and its losses."""

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


class AlignmentConfig(Section):
    """The alignment of one block of the model with one teacher."""

    teacher: TeacherConfig
    """Whose tokens are the target."""

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
    """What happens where the teacher's grid of tokens is not the model's; null: it has to be."""

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

    def factors_at(self, step: int) -> "TermFactors":
        """Returns what the schedules make of the terms' weights at optimizer step `step` (from 0).

        0 for an absent term. Once both are 0 the alignment is over and needs no teacher; a weight
        that is configured as 0 keeps its factor, and its term is measured.
        """
        terms = (self.pointwise, self.structural)
        return TermFactors(*(weight_factor(t.schedule, step) if t else 0.0 for t in terms))

    @property
    def is_scheduled(self) -> bool:
        """Whether any term's weight changes over training."""
        terms = [term for term in (self.pointwise, self.structural) if term]
        return any(term.schedule.kind != "constant" for term in terms)

    @property
    def pointwise_weight(self) -> float:
        """The factor of the point-wise term, 0 where it is absent."""
        return self.pointwise.weight if self.pointwise else 0.0

    @property
    def structural_weight(self) -> float:
        """The factor of the structural term, 0 where it is absent."""
        return self.structural.weight if self.structural else 0.0


class TermFactors(NamedTuple):
    """What schedules make of the weights of an alignment's terms, each in [0, 1]."""

    pointwise: float
    structural: float


class TeacherShape(NamedTuple):
    """What the student has to know of a teacher before its first token."""

    width: int
    grid: Grid


class AlignmentLosses(NamedTuple):
    """The terms of one teacher before their weights; exactly zero where a term is absent."""

    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]


def projector_of(
    config: AlignmentConfig,
    *,
    hidden_size: int,
    grid: Grid,
    teacher: TeacherShape,
    generator: torch.Generator | None,
) -> nn.Module:
    """Returns the projector that `config` asks for; one without weights if no term needs any."""
    if not config.has_projector:
        return nn.Identity()
    return build_projector(config.projector, hidden_size, teacher.width, generator, grid=grid)


def alignment_losses(
    config: AlignmentConfig,
    projector: nn.Module,
    hidden: Float[Tensor, "batch student_tokens d_hidden"],
    teacher: TeacherTokens,
    *,
    grid: Grid,
    teacher_grid: Grid,
    factors: "TermFactors | None" = None,
) -> AlignmentLosses:
    """Returns the terms of `config` for the model's states `hidden`, at least float32.

    A term whose factor is 0 is over: it is not computed, and comes out as an absent one.

    `grid` is that of the model's patch tokens, which come last in `hidden`; what stands before them
    is its class token. The teacher's tokens are normalised before they are resampled. Raises
    ValueError for token counts that do not fit.
    """
    pointwise, structural = _live(config, factors)
    spaces = {"projected"} if pointwise else set()
    spaces |= {structural.tokens} if structural else set()
    absent = hidden.new_zeros((), dtype=compute_dtype(hidden, teacher.patches))
    losses = AlignmentLosses(absent, absent)
    if config.has_projector and "projected" not in spaces:
        losses = idle_losses(config, projector, hidden, grid=grid)
    target = target_tokens(config, teacher, grid=grid, teacher_grid=teacher_grid)
    student = {
        space: _student_side(config, projector, hidden, space, grid, teacher_grid)
        for space in sorted(spaces)
    }
    if pointwise is not None:
        sides = _sequences(student["projected"], target, include_cls=pointwise.include_cls)
        losses = losses._replace(pointwise=pointwise_cosine(*sides))
    if structural is not None:
        sides = _sequences(student[structural.tokens], target, include_cls=structural.include_cls)
        losses = losses._replace(structural=structural_loss(structural, *sides))
    return losses


def _live(
    config: AlignmentConfig, factors: TermFactors | None
) -> tuple[PointwiseConfig | None, StructuralConfig | None]:
    """Returns the terms that are not over."""
    if factors is None:
        return config.pointwise, config.structural
    return (
        config.pointwise if factors.pointwise else None,
        config.structural if factors.structural else None,
    )


def target_tokens(
    config: AlignmentConfig, teacher: TeacherTokens, *, grid: Grid, teacher_grid: Grid
) -> TeacherTokens:
    """Returns the teacher's tokens as the terms see them: normalised, then on the common grid."""
    patches = teacher.patches
    if config.spatial_norm is not None:
        patches = spatially_normalised(patches, gamma=config.spatial_norm.gamma)
    if config.resampling is not None and config.resampling.direction == "teacher_to_student":
        patches = resampled(patches, teacher_grid, grid, mode=config.resampling.mode)
    return TeacherTokens(patches, teacher.cls)


def student_patches(
    config: AlignmentConfig,
    patch_tokens: Float[Tensor, "batch student_tokens width"],
    *,
    grid: Grid,
    teacher_grid: Grid,
) -> Float[Tensor, "batch compared_tokens width"]:
    """Returns the student's patch tokens, projected or not, on the grid where they are compared."""
    resampling = config.resampling
    if resampling is None or resampling.direction == "teacher_to_student":
        return patch_tokens
    return resampled(patch_tokens, grid, teacher_grid, mode=resampling.mode)


def idle_losses(
    config: AlignmentConfig,
    projector: nn.Module,
    hidden: Float[Tensor, "batch student_tokens d_hidden"],
    *,
    grid: Grid,
) -> AlignmentLosses:
    """Returns zeros for an alignment that is over, with zero gradients for its projector.

    Every trained weight takes part in every step on every rank, which ZeRO relies on; one image is
    enough for that.
    """
    zero = hidden.new_zeros((), dtype=compute_dtype(hidden, hidden))
    if not config.has_projector:
        return AlignmentLosses(zero, zero)
    first = hidden[:1].detach()
    projected = _student_side(config, projector, first, "projected", grid, grid).patches
    return AlignmentLosses(projected.sum().to(zero.dtype) * 0, zero)


class _Side(NamedTuple):
    """The tokens of one of the two that are compared."""

    patches: Tensor
    cls: Tensor | None


def _split(hidden: Tensor, grid: Grid) -> _Side:
    """Returns the model's patch tokens and, where it carries one, its class token."""
    num_prefix = hidden.shape[1] - grid[0] * grid[1]
    if num_prefix not in (0, 1):
        raise ValueError(
            f"{hidden.shape[1]} tokens are no grid of {grid}, with or without a class token"
        )
    return _Side(hidden[:, num_prefix:], hidden[:, 0] if num_prefix else None)


def _student_side(
    config: AlignmentConfig,
    projector: nn.Module,
    hidden: Tensor,
    space: str,
    grid: Grid,
    teacher_grid: Grid,
) -> _Side:
    """Returns the student's tokens as the terms of a space see them, on the common grid."""
    states = _split(hidden, grid)
    if config.projects_cls and states.cls is None:
        raise ValueError("include_cls needs a model that carries a class token")
    if space == "hidden":
        patches, cls = states
    elif config.projects_cls:
        projected = projector(hidden)
        patches, cls = projected[:, 1:], projected[:, 0]
    else:
        patches, cls = projector(states.patches), None
    return _Side(student_patches(config, patches, grid=grid, teacher_grid=teacher_grid), cls)


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
