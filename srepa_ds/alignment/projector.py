"""The trained maps from the student's width to a teacher's, one row of a table each."""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from srepa_ds.alignment.tokens import Grid
from srepa_ds.schema import OnlyFor, Section, one_of


class TokenProjector(nn.Sequential):
    """Layers applied to every token; the input is cast to the dtype of the weights.

    The residual stream is float32 even where the weights are bf16.
    """

    def forward(
        self, input: Float[Tensor, "batch tokens width_in"]
    ) -> Float[Tensor, "batch tokens width_out"]:
        """Returns the projected tokens, in the dtype of the weights."""
        first = self[0]
        assert isinstance(first, nn.Linear)
        return super().forward(input.to(first.weight.dtype))


class SpatialProjector(nn.Module):
    """One layer between grids of tokens (iREPA); it sees patch tokens only, never a class token."""

    def __init__(self, layer: nn.Conv2d, grid: Grid):
        super().__init__()
        self.grid = grid
        self.projection_layer = layer

    def forward(
        self, input: Float[Tensor, "batch tokens width_in"]
    ) -> Float[Tensor, "batch tokens width_out"]:
        """Returns the projected tokens, in the dtype of the weights; zeros surround the grid."""
        image = input.to(self.projection_layer.weight.dtype).mT.unflatten(2, self.grid)
        return self.projection_layer(image).flatten(2).mT


class LinearProjector(nn.Module):
    """One linear map of every token, under the name that iREPA gives it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.projection_layer = layer

    def forward(
        self, input: Float[Tensor, "batch tokens width_in"]
    ) -> Float[Tensor, "batch tokens width_out"]:
        """Returns the projected tokens, in the dtype of the weights."""
        return self.projection_layer(input.to(self.projection_layer.weight.dtype))


Projector = TokenProjector | SpatialProjector | LinearProjector


def _mlp(config: "ProjectorConfig", width_in: int, width_out: int, grid: Grid) -> TokenProjector:
    hidden_width = config.hidden_width
    return TokenProjector(
        _linear(width_in, hidden_width),
        nn.SiLU(),
        _linear(hidden_width, hidden_width),
        nn.SiLU(),
        _linear(hidden_width, width_out),
    )


def _conv(config: "ProjectorConfig", width_in: int, width_out: int, grid: Grid) -> SpatialProjector:
    device = torch.get_default_device()
    # An ordinary construction would draw from torch's global generator.
    layer = nn.utils.skip_init(
        nn.Conv2d,
        width_in,
        width_out,
        kernel_size=config.kernel,
        padding=config.kernel // 2,
        device=device,
    )
    assert isinstance(layer, nn.Conv2d)
    return SpatialProjector(layer, grid)


def _single(
    config: "ProjectorConfig", width_in: int, width_out: int, grid: Grid
) -> LinearProjector:
    return LinearProjector(_linear(width_in, width_out))


def _linear(width_in: int, width_out: int) -> nn.Linear:
    device = torch.get_default_device()
    linear = nn.utils.skip_init(nn.Linear, width_in, width_out, device=device)
    assert isinstance(linear, nn.Linear)
    return linear


PROJECTORS: dict[str, Callable[["ProjectorConfig", int, int, Grid], Projector]] = {
    "mlp": _mlp,
    "linear": _single,
    "conv": _conv,
}


class ProjectorConfig(Section):
    """The projector between the aligned block and the teacher."""

    kind: Annotated[str, one_of("projector", PROJECTORS)] = "mlp"
    """`mlp`: Linear, SiLU, Linear, SiLU, Linear on every token, as in REPA and sREPA; `linear`: one
    Linear; `conv`: one convolution over the grid of tokens, as in iREPA."""

    hidden_width: Annotated[int, OnlyFor("kind", "mlp")] = Field(default=2048, ge=1)
    """Width of the hidden layers (mlp only)."""

    kernel: Annotated[int, OnlyFor("kind", "conv")] = Field(default=3, ge=1)
    """Side of the convolution's window, odd (conv only); iREPA's paper: 3, its trainer's default
    for latents: 1."""

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> "ProjectorConfig":
        if self.kernel % 2 == 0:
            raise ValueError(
                f"kernel {self.kernel} is even, which would shift the grid; 3 is usual"
            )
        return self


def build_projector(
    config: ProjectorConfig,
    width_in: int,
    width_out: int,
    generator: torch.Generator | None,
    *,
    grid: Grid,
) -> Projector:
    """Returns the projector (b, n, width_in) -> (b, n, width_out), filled from `generator`.

    `grid` is that of the student's tokens; only `conv` uses it. Linear weights are Xavier-uniform
    and their biases zero, as all of REPA's; a convolution's are uniform within 1 / sqrt(fan-in), as
    iREPA leaves them. Drawn layer by layer in float32 on the CPU; without a generator all are zero.
    The keys of the state are those of REPA's and iREPA's `projectors.<i>`.
    """
    projector = PROJECTORS[config.kind](config, width_in, width_out, grid)
    for layer in projector.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not layer.weight.is_meta:
            _fill(layer, generator)
    return projector


@torch.no_grad()
def _fill(layer: nn.Linear | nn.Conv2d, generator: torch.Generator | None) -> None:
    assert layer.bias is not None
    layer.bias.zero_()
    if generator is None:
        layer.weight.zero_()
        return
    drawn = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
    if isinstance(layer, nn.Linear):
        layer.weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
        return
    bound = math.prod(layer.weight.shape[1:]) ** -0.5
    layer.weight.copy_(drawn.uniform_(-bound, bound, generator=generator))
    drawn = torch.empty(layer.bias.shape, dtype=torch.float32, device="cpu")
    layer.bias.copy_(drawn.uniform_(-bound, bound, generator=generator))
