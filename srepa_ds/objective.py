"""What is minimised: flow matching plus alignment, in one module that owns every trained weight."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from srepa_ds import noise
from srepa_ds.alignment.alignment import (
    AlignmentConfig,
    AlignmentLosses,
    TeacherShape,
    TermFactors,
    alignment_losses,
    idle_losses,
    projector_of,
)
from srepa_ds.encoders.teacher import TeacherTokens
from srepa_ds.interpolant import (
    INTERPOLANTS,
    TIME_WEIGHTINGS,
    InterpolantConfig,
    Noised,
    flow_loss,
    sample_time,
)
from srepa_ds.model.embeddings import drop_labels
from srepa_ds.model.sit import SiT, SiTOutput
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import Stream
from srepa_ds.schema import Section

TIME_BINS = 10
"""Equal parts of t in [0, 1] for which the flow loss is recorded apart."""


class ObjectiveConfig(Section):
    """The flow-matching part of the loss."""

    interpolant: InterpolantConfig = InterpolantConfig()
    """The path between data and noise, and how time is drawn."""

    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null label, for classifier-free guidance."""

    cls_weight: float = Field(default=0.03, ge=0)
    """Factor of the class token's flow loss, where the model carries one (REG: 0.03)."""


class TrainingInputs(NamedTuple):
    """Everything one forward pass needs; all randomness is already drawn."""

    latents: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]
    t: Float[Tensor, " batch"]
    noise: Float[Tensor, "batch channels height width"]
    teacher_patches: tuple[Float[Tensor, "batch tokens teacher_width"] | None, ...] = ()
    """One per alignment; None where its schedule has ended."""
    teacher_cls: tuple[Float[Tensor, "batch teacher_width"] | None, ...] = ()
    """One per alignment, None without a class token; may be left empty if no term needs any."""
    cls_noise: Float[Tensor, "batch teacher_width"] | None = None
    """For the class token of the first teacher, where the model carries it."""
    factors: tuple[tuple[float, float], ...] | None = None
    """What schedules make of each alignment's point-wise and structural weight; None: all are 1.
    Numbers of the host, so that a term that is over costs nothing."""


class Losses(NamedTuple):
    """Scalars on the device: the weighted total, and its terms unweighted (means over teachers)."""

    total: Float[Tensor, ""]
    flow: Float[Tensor, ""]
    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]
    cls: Float[Tensor, ""]
    flow_by_time: Float[Tensor, "2 bins"]
    """Sums of the samples' flow losses, and their numbers, in equal parts of t in [0, 1]."""


def draw_inputs(
    config: ObjectiveConfig,
    model: SiTConfig,
    latents: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    *,
    positions: Int[Tensor, " batch"],
    seed: int,
) -> TrainingInputs:
    """Returns the inputs with time, noise and label dropout drawn by global sample position.

    Without teacher tokens, which are no draw.
    """
    weighting = TIME_WEIGHTINGS[config.interpolant.time_weighting]
    draw = weighting.draw(seed, Stream.TIME, positions)
    t = sample_time(weighting, INTERPOLANTS[config.interpolant.path], draw)
    gaussian = noise.normal(seed, Stream.NOISE, positions, tuple(latents.shape[1:]))
    uniforms = noise.uniform(seed, Stream.LABEL_DROP, positions)
    labels = drop_labels(
        labels, uniforms, probability=config.label_dropout, null_label=model.null_label
    )
    cls_noise = None
    if model.class_token_width is not None:
        cls_noise = noise.normal(seed, Stream.CLS_NOISE, positions, (model.class_token_width,))
    return TrainingInputs(latents, labels, t, gaussian.to(latents.dtype), cls_noise=cls_noise)


class Objective(nn.Module):
    """SiT and one projector per teacher; its forward returns the losses (paper, Eq. 9).

    One module owns all trained weights, so ZeRO's hooks, gradient reduction and compilation see one
    thing.
    """

    def __init__(
        self,
        model: SiTConfig,
        config: ObjectiveConfig,
        alignments: tuple[AlignmentConfig, ...] = (),
        *,
        teachers: tuple[TeacherShape, ...] = (),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        assert len(alignments) == len(teachers)
        self._interpolant = INTERPOLANTS[config.interpolant.path]
        self._cls_weight = config.cls_weight
        self._alignments = alignments
        self._teacher_grids = tuple(teacher.grid for teacher in teachers)
        self.sit = SiT(model, generator)
        self.projectors = nn.ModuleList(
            projector_of(
                alignment,
                hidden_size=model.shape.hidden_size,
                grid=model.grid,
                teacher=teacher,
                generator=generator,
            )
            for alignment, teacher in zip(alignments, teachers, strict=True)
        )

    def forward(self, *inputs: Any, predict: bool = False) -> Losses | SiTOutput:
        """Returns the losses of one micro batch, given the fields of `TrainingInputs`.

        With `predict`, the model's output for x_t, t, labels and a class token or None: sampling
        during training has to pass through the same module as training.
        """
        if predict:
            x_t, t, labels, *cls_t = inputs
            return self.sit(x_t, t, labels, cls_t=cls_t[0] if cls_t else None)
        return self._losses(TrainingInputs(*inputs))

    def _losses(self, given: TrainingInputs) -> Losses:
        noised = self._interpolant.noised(given.latents, given.noise, given.t)
        noised_cls = self._noised_cls(given)
        output = self.sit(
            noised.x_t,
            noised.t,
            given.labels,
            cls_t=noised_cls.x_t if noised_cls else None,
            depths=tuple(alignment.depth for alignment in self._alignments),
        )
        flow_of_sample = flow_loss(output.velocity, noised.velocity)
        flow = flow_of_sample.mean()
        total, cls = flow, torch.zeros_like(flow)
        if noised_cls is not None:
            cls = flow_loss(output.cls_velocity, noised_cls.velocity).mean()
            total = total + self._cls_weight * cls
        pointwise, structural = torch.zeros_like(flow), torch.zeros_like(flow)
        count = max(1, len(self._alignments))
        for number, terms in enumerate(self._alignment_losses(output.hidden, given)):
            pointwise = pointwise + terms.pointwise / count
            structural = structural + terms.structural / count
            factors = (1.0, 1.0) if given.factors is None else given.factors[number]
            total = total + self._weighted(number, terms, factors) / count
        by_time = _by_time(flow_of_sample.detach(), given.t)
        terms = (pointwise.detach(), structural.detach(), cls.detach())
        return Losses(total, flow, *terms, by_time)

    def _noised_cls(self, given: TrainingInputs) -> Noised | None:
        """Returns the first teacher's class token on the path from data to noise (REG)."""
        if given.cls_noise is None:
            return None
        assert given.teacher_cls[0] is not None
        # At the image's time, with noise of its own; neither normalised nor scaled.
        return self._interpolant.noised(given.teacher_cls[0], given.cls_noise, given.t)

    def _alignment_losses(
        self, hidden: tuple[Tensor, ...], given: TrainingInputs
    ) -> Iterator[AlignmentLosses]:
        """Yields the terms of each alignment in turn."""
        cls_tokens = given.teacher_cls or (None,) * len(self._alignments)
        all_factors = given.factors or ((1.0, 1.0),) * len(self._alignments)
        for alignment, projector, states, patches, cls, teacher_grid, factors in zip(
            self._alignments,
            self.projectors,
            hidden,
            given.teacher_patches,
            cls_tokens,
            self._teacher_grids,
            all_factors,
            strict=True,
        ):
            grid = self.sit.grid
            if patches is None:
                yield idle_losses(alignment, projector, states, grid=grid)
                continue
            yield alignment_losses(
                alignment,
                projector,
                states,
                TeacherTokens(patches, cls),
                grid=grid,
                teacher_grid=teacher_grid,
                factors=TermFactors(*factors),
            )

    def _weighted(
        self, number: int, terms: AlignmentLosses, factors: tuple[float, float]
    ) -> Tensor:
        alignment = self._alignments[number]
        pointwise = factors[0] * alignment.pointwise_weight * terms.pointwise
        return pointwise + factors[1] * alignment.structural_weight * terms.structural


def _by_time(values: Tensor, t: Tensor) -> Tensor:
    """Returns sums and counts of `values` in each part of t.

    Without scattering, so nothing is atomic, and without a matrix product, which autocast rounds.
    """
    part = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    inside = part[:, None] == torch.arange(TIME_BINS, device=t.device)
    inside = inside.to(values.dtype)
    return torch.stack(((values[:, None] * inside).sum(0), inside.sum(0)))


def official_name(name: str) -> str:
    """Returns the name a weight of `Objective` has in the official REPA state_dict."""
    return name.removeprefix("sit.")
