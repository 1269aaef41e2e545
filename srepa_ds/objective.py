"""The training loss: flow matching plus alignment, in one module that owns every trained weight."""

from typing import NamedTuple, overload

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from srepa_ds import noise
from srepa_ds.alignment.alignment import (
    Alignment,
    AlignmentConfig,
    TeacherShape,
    TermWeights,
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
from srepa_ds.noise import NoiseStream
from srepa_ds.schema import Section

TIME_BINS = 10
"""Equal parts of t in [0, 1] for which the flow loss is recorded separately."""


class ObjectiveConfig(Section):
    """The flow-matching part of the loss."""

    interpolant: InterpolantConfig = InterpolantConfig()
    """The path between data and noise, and how time is drawn."""

    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null label, for classifier-free guidance."""

    cls_weight: float = Field(default=0.03, ge=0)
    """Factor of the class token's flow loss, where the model carries one (REG: 0.03)."""


class TrainingInputs(NamedTuple):
    """The request for one micro batch's losses; all randomness is already drawn."""

    latents: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]
    t: Float[Tensor, " batch"]
    noise: Float[Tensor, "batch channels height width"]
    teacher_patches: tuple[Float[Tensor, "batch tokens teacher_width"] | None, ...] = ()
    """One per alignment; may be None where its terms are over."""
    teacher_cls: tuple[Float[Tensor, "batch teacher_width"] | None, ...] = ()
    """One per alignment, None without a class token; may be left empty if no term needs any."""
    cls_noise: Float[Tensor, "batch teacher_width"] | None = None
    """For the class token of the first teacher, where the model carries it."""
    term_weights: tuple[TermWeights, ...] | None = None
    """One per alignment; None: those of the first step, which no schedule has changed yet."""

    def teacher_tokens(self) -> tuple[TeacherTokens | None, ...]:
        """Returns the tokens of each alignment's teacher."""
        cls_tokens = self.teacher_cls or (None,) * len(self.teacher_patches)
        return tuple(
            None if patches is None else TeacherTokens(patches, cls)
            for patches, cls in zip(self.teacher_patches, cls_tokens, strict=True)
        )


class SamplingInputs(NamedTuple):
    """The request for the model's output at one time of sampling."""

    x_t: Float[Tensor, "batch channels height width"]
    t: Float[Tensor, " batch"]
    labels: Int[Tensor, " batch"]
    cls_t: Float[Tensor, "batch teacher_width"] | None = None
    """The noised class token, where the model carries one."""


class Losses(NamedTuple):
    """Scalars on the device: the weighted total, and its terms unweighted (means over teachers)."""

    total: Float[Tensor, ""]
    flow: Float[Tensor, ""]
    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]
    cls: Float[Tensor, ""]
    flow_by_time: Float[Tensor, "2 bins"]
    """Sums and counts of the samples' flow losses in equal parts of t in [0, 1]."""


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

    Teacher tokens are not drawn: they are left out.
    """
    weighting = TIME_WEIGHTINGS[config.interpolant.time_weighting]
    draw = weighting.draw(seed, NoiseStream.TIME, positions)
    t = sample_time(weighting, INTERPOLANTS[config.interpolant.path], draw)
    gaussian = noise.normal(seed, NoiseStream.NOISE, positions, tuple(latents.shape[1:]))
    uniforms = noise.uniform(seed, NoiseStream.LABEL_DROP, positions)
    labels = drop_labels(
        labels, uniforms, probability=config.label_dropout, null_label=model.null_label
    )
    cls_noise = None
    if model.class_token_width is not None:
        cls_noise = noise.normal(seed, NoiseStream.CLS_NOISE, positions, (model.class_token_width,))
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
        self._alignments = tuple(
            Alignment(alignment, model.grid, teacher)
            for alignment, teacher in zip(alignments, teachers, strict=True)
        )
        self.sit = SiT(model, generator)
        self.projectors = nn.ModuleList(
            alignment.new_projector(model.shape.hidden_size, generator)
            for alignment in self._alignments
        )

    @overload
    def forward(self, request: TrainingInputs) -> Losses: ...

    @overload
    def forward(self, request: SamplingInputs) -> SiTOutput: ...

    def forward(self, request: TrainingInputs | SamplingInputs) -> Losses | SiTOutput:
        """Returns the losses of one micro batch, or the model's output to sample with.

        ZeRO's hooks gather weights around this module's call, so sampling during training has to
        pass through it as well.
        """
        match request:
            case TrainingInputs():
                return self._losses(request)
            case SamplingInputs():
                return self.sit(request.x_t, request.t, request.labels, cls_t=request.cls_t)

    def _losses(self, given: TrainingInputs) -> Losses:
        noised = self._interpolant.noised(given.latents, given.noise, given.t)
        noised_cls = self._noised_cls(given)
        output = self.sit(
            noised.x_t,
            noised.t,
            given.labels,
            cls_t=noised_cls.x_t if noised_cls else None,
            depths=tuple(alignment.config.depth for alignment in self._alignments),
        )
        flow_of_sample = flow_loss(output.velocity, noised.velocity)
        flow = flow_of_sample.mean()
        total, cls = flow, torch.zeros_like(flow)
        if noised_cls is not None:
            cls = flow_loss(output.cls_velocity, noised_cls.velocity).mean()
            total = total + self._cls_weight * cls
        pointwise, structural = torch.zeros_like(flow), torch.zeros_like(flow)
        count = max(1, len(self._alignments))
        all_weights = given.term_weights
        if all_weights is None:
            all_weights = tuple(alignment.config.weights_at(0) for alignment in self._alignments)
        for alignment, projector, hidden, teacher, weights in zip(
            self._alignments,
            self.projectors,
            output.hidden,
            given.teacher_tokens(),
            all_weights,
            strict=True,
        ):
            terms = alignment(projector, hidden, teacher, weights)
            pointwise = pointwise + terms.pointwise / count
            structural = structural + terms.structural / count
            total = total + weights.total(terms) / count
        by_time = _by_time(flow_of_sample.detach(), given.t)
        recorded = (pointwise.detach(), structural.detach(), cls.detach())
        return Losses(total, flow, *recorded, by_time)

    def _noised_cls(self, given: TrainingInputs) -> Noised | None:
        """Returns the first teacher's class token on the path from data to noise (REG)."""
        if given.cls_noise is None:
            return None
        assert given.teacher_cls[0] is not None
        # At the image's time, with noise of its own; neither normalised nor scaled.
        return self._interpolant.noised(given.teacher_cls[0], given.cls_noise, given.t)


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
