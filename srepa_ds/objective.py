"""What is minimised: flow matching plus alignment, in one module that owns every trained weight."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from srepa_ds import noise
from srepa_ds.alignment.losses import AlignmentConfig, alignment_losses
from srepa_ds.alignment.projector import build_projector
from srepa_ds.interpolant import (
    INTERPOLANTS,
    TIME_WEIGHTINGS,
    InterpolantConfig,
    flow_loss,
    sample_time,
)
from srepa_ds.model.embeddings import drop_labels
from srepa_ds.model.sit import SiT
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import Stream
from srepa_ds.schema import Section


class ObjectiveConfig(Section):
    """The flow-matching part of the loss."""

    interpolant: InterpolantConfig = InterpolantConfig()
    """The path between data and noise, and how time is drawn."""

    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null label, for classifier-free guidance."""


class TrainingInputs(NamedTuple):
    """Everything one forward pass needs; all randomness is already drawn."""

    latents: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, "batch"]
    t: Float[Tensor, "batch"]
    noise: Float[Tensor, "batch channels height width"]
    teacher_patches: tuple[Float[Tensor, "batch tokens teacher_width"], ...]


class Losses(NamedTuple):
    """Scalars on the device: the weighted total, and its terms unweighted (means over teachers)."""

    total: Float[Tensor, ""]
    flow: Float[Tensor, ""]
    pointwise: Float[Tensor, ""]
    structural: Float[Tensor, ""]


def draw_inputs(
    config: ObjectiveConfig,
    latents: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch"],
    teacher_patches: tuple[Tensor, ...],
    *,
    positions: Int[Tensor, "batch"],
    seed: int,
    null_label: int,
) -> TrainingInputs:
    """Returns the inputs with time, noise and label dropout drawn by global sample position."""
    weighting = TIME_WEIGHTINGS[config.interpolant.time_weighting]
    draw = weighting.draw(seed, Stream.TIME, positions)
    t = sample_time(weighting, INTERPOLANTS[config.interpolant.path], draw)
    gaussian = noise.normal(seed, Stream.NOISE, positions, tuple(latents.shape[1:]))
    uniforms = noise.uniform(seed, Stream.LABEL_DROP, positions)
    labels = drop_labels(labels, uniforms, probability=config.label_dropout, null_label=null_label)
    return TrainingInputs(latents, labels, t, gaussian.to(latents.dtype), teacher_patches)


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
        teacher_widths: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        assert len(alignments) == len(teacher_widths)
        self._interpolant = INTERPOLANTS[config.interpolant.path]
        self._alignments = alignments
        self.sit = SiT(model, generator)
        self.projectors = nn.ModuleList(
            build_projector(alignment.projector, model.shape.hidden_size, width, generator)
            for alignment, width in zip(alignments, teacher_widths, strict=True)
        )

    def forward(self, *inputs: Tensor | tuple[Tensor, ...]) -> Losses:
        """Returns the losses of one micro batch, given the fields of `TrainingInputs`."""
        latents, labels, t, gaussian, teacher_patches = TrainingInputs(*inputs)  # type: ignore[arg-type]
        noised = self._interpolant.noised(latents, gaussian, t)
        depths = tuple(alignment.depth for alignment in self._alignments)
        output = self.sit(noised.x_t, noised.t, labels, depths=depths)
        flow = flow_loss(output.velocity, noised.velocity).mean()
        total, pointwise, structural = flow, torch.zeros_like(flow), torch.zeros_like(flow)
        count = max(1, len(self._alignments))
        for alignment, projector, hidden, teacher in zip(
            self._alignments, self.projectors, output.hidden, teacher_patches, strict=True
        ):
            terms = alignment_losses(alignment, projector(hidden), teacher)
            pointwise = pointwise + terms.pointwise / count
            structural = structural + terms.structural / count
            total = (
                total
                + (
                    alignment.pointwise_weight * terms.pointwise
                    + alignment.structural_weight * terms.structural
                )
                / count
            )
        return Losses(total, flow, pointwise.detach(), structural.detach())


def official_name(name: str) -> str:
    """Returns the name a weight of `Objective` has in the official REPA state_dict."""
    return name.removeprefix("sit.")
