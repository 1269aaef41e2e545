"""The trained maps from the student's width to a teacher's, a row of a table each."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from srepa_ds.schema import Section, known_in


class Projector(nn.Sequential):
    """Layers applied to every token; input is taken in the dtype of the weights.

    The residual stream is float32 even where the weights are bf16.
    """

    def forward(
        self, input: Float[Tensor, "batch tokens width_in"]
    ) -> Float[Tensor, "batch tokens width_out"]:
        """Returns the projected tokens, in the dtype of the weights."""
        first = self[0]
        assert isinstance(first, nn.Linear)
        return super().forward(input.to(first.weight.dtype))


def _mlp(width_in: int, hidden_width: int, width_out: int) -> Projector:
    return Projector(
        _linear(width_in, hidden_width),
        nn.SiLU(),
        _linear(hidden_width, hidden_width),
        nn.SiLU(),
        _linear(hidden_width, width_out),
    )


def _linear(width_in: int, width_out: int) -> nn.Linear:
    # An ordinary construction would draw from the process's generator.
    device = torch.get_default_device()
    linear = nn.utils.skip_init(nn.Linear, width_in, width_out, device=device)
    assert isinstance(linear, nn.Linear)
    return linear


PROJECTORS = {"mlp": _mlp}


class ProjectorConfig(Section):
    """The projector between the aligned block and the teacher."""

    kind: Annotated[str, known_in("projector", PROJECTORS)] = "mlp"
    """`mlp`: Linear, SiLU, Linear, SiLU, Linear on every token, as in REPA and sREPA."""

    hidden_width: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""


def build_projector(
    config: ProjectorConfig, width_in: int, width_out: int, generator: torch.Generator | None
) -> Projector:
    """Returns the projector (b, n, width_in) -> (b, n, width_out), filled from `generator`.

    Weights are Xavier-uniform and biases zero, drawn layer by layer in float32 on the CPU; without
    a generator all are zero. The keys of its state are those of REPA's `projectors.<i>`.
    """
    projector = PROJECTORS[config.kind](width_in, config.hidden_width, width_out)
    for layer in projector:
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta:
            _fill(layer, generator)
    return projector


@torch.no_grad()
def _fill(layer: nn.Linear, generator: torch.Generator | None) -> None:
    nn.init.zeros_(layer.bias)
    if generator is None:
        nn.init.zeros_(layer.weight)
        return
    drawn = torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu")
    layer.weight.copy_(nn.init.xavier_uniform_(drawn, generator=generator))
