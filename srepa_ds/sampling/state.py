"""The state the solvers integrate: image and, in REG, class token, as one vector per sample.

Solvers, scores and guidance work element by element, so they need not know what an element is.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from srepa_ds import noise
from srepa_ds.errors import ConfigError, Fault
from srepa_ds.model.sit import SiTOutput
from srepa_ds.model.variants import SiTConfig
from srepa_ds.noise import NoiseStream
from srepa_ds.sampling.guidance import Guidance, VelocityModel


@dataclass(frozen=True)
class StateLayout:
    """The parts of a state (b, c * h * w + class_token_width): latents, then the class token."""

    latent_shape: tuple[int, int, int]
    class_token_width: int | None = None

    @classmethod
    def of(cls, config: SiTConfig) -> "StateLayout":
        """Returns the layout of the states of a model."""
        return cls(config.latent_shape, config.class_token_width)

    def pack(
        self,
        latents: Float[Tensor, "batch channels height width"],
        cls_token: Float[Tensor, "batch class_token_width"] | None = None,
    ) -> Float[Tensor, "batch elements"]:
        """Returns the state of `latents` and, where the layout has one, `cls_token`."""
        flat = latents.flatten(1)
        return flat if cls_token is None else torch.cat((flat, cls_token), dim=1)

    def unpack(
        self, state: Float[Tensor, "batch elements"]
    ) -> tuple[
        Float[Tensor, "batch channels height width"],
        Float[Tensor, "batch class_token_width"] | None,
    ]:
        """Returns the latents and the class token (None where the layout has none)."""
        if self.class_token_width is None:
            return state.reshape(-1, *self.latent_shape), None
        flat, cls_token = state.split((math.prod(self.latent_shape), self.class_token_width), dim=1)
        return flat.reshape(-1, *self.latent_shape), cls_token

    def normal(
        self,
        seed: int,
        streams: tuple[NoiseStream, NoiseStream],
        sample_ids: Int64[Tensor, " batch"],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "batch elements"]:
        """Returns a state of standard normal numbers, one noise stream for each part."""
        latents = noise.normal(
            seed, streams[0], sample_ids, self.latent_shape, draw=draw, dtype=dtype
        )
        if self.class_token_width is None:
            return self.pack(latents)
        width = (self.class_token_width,)
        return self.pack(
            latents, noise.normal(seed, streams[1], sample_ids, width, draw=draw, dtype=dtype)
        )

    def guidance_scales(
        self, guidance: Guidance, device: torch.device | str = "cpu"
    ) -> Float[Tensor, " elements"]:
        """Returns the float64 scale of every element: of the image, then of the class token.

        Channels that are not guided have scale 1, the conditional branch, as in the first SiT's and
        DiT's `forward_with_cfg`. Raises ConfigError if more are to be guided than there are.
        """
        channels, height, width = self.latent_shape
        guided = channels if guidance.channels is None else guidance.channels
        if guided > channels:
            reason = (
                f"{guided} exceeds the {channels} channels of the model's latents; choose fewer, "
                "or null for all"
            )
            raise ConfigError("configuration", [Fault("sample.guided_channels", reason)])
        parts = (
            (guided * height * width, guidance.scale),
            ((channels - guided) * height * width, 1.0),
            (self.class_token_width or 0, guidance.cls_branch_scale),
        )
        return torch.cat(
            [torch.full((n,), scale, dtype=torch.float64, device=device) for n, scale in parts]
        )


@runtime_checkable
class SamplingModel(Protocol):
    """A SiT, or anything that can be called like one."""

    @property
    def config(self) -> SiTConfig:
        """The sizes of the model."""

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor, *, cls_t: Tensor | None = None
    ) -> SiTOutput:
        """Returns the velocity, and that of the class token if there is one."""


def state_velocity(model: SamplingModel) -> VelocityModel:
    """Returns the velocity of a model as a function of (state, t (b,), labels (b,))."""
    layout = StateLayout.of(model.config)

    def velocity(state: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x_t, cls_t = layout.unpack(state)
        output = model(x_t, t, labels, cls_t=cls_t)
        return layout.pack(output.velocity, output.cls_velocity)

    return velocity
