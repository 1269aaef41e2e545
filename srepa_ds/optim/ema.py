"""Moving averages of the weights: fp32, one shard per rank, no communication."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from srepa_ds.optim.power_ema import LARGEST_SIGMA, gamma_of, power_decay
from srepa_ds.schema import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
RelativeLength = Annotated[float, Field(gt=0, le=LARGEST_SIGMA)]

MAIN_EMA = "ema"
"""The kind of the average that is exported and evaluated by default."""


class EmaConfig(Section):
    """The moving averages of the weights."""

    decay: Decay = 0.9999
    """Share of the average kept at each step (REPA: 0.9999)."""

    warmup: bool = False
    """Start as a running mean: use min(decay, 1 - 1 / (step + 1)). For short runs; the paper uses
    none."""

    more_decays: tuple[Decay, ...] = ()
    """Further averages to keep, each stored as `ema-<decay>`."""

    power_sigmas: tuple[RelativeLength, ...] = ()
    """Relative lengths of power-function averages to keep, each stored as `ema-power-<sigma>`; with
    two (EDM2: 0.05 and 0.1) `srepa-ds export` can make averages of other lengths afterwards."""

    @model_validator(mode="after")
    def _names_differ(self) -> "EmaConfig":
        for name in ("more_decays", "power_sigmas"):
            shown = [f"{value:g}" for value in getattr(self, name)]
            if len(set(shown)) < len(shown):
                raise ValueError(f"{name} contains a value twice: {', '.join(shown)}")
        return self


def decays_of(config: EmaConfig) -> dict[str, Callable[[int], float]]:
    """Returns each average's decay by its kind, as a function of the step (counted from 1)."""

    def exponential(decay: float) -> Callable[[int], float]:
        return lambda step: min(decay, 1 - 1 / (step + 1)) if config.warmup else decay

    def power(sigma: float) -> Callable[[int], float]:
        gamma = gamma_of(sigma)
        return lambda step: power_decay(gamma, step)

    return {
        MAIN_EMA: exponential(config.decay),
        **{f"{MAIN_EMA}-{decay:g}": exponential(decay) for decay in config.more_decays},
        **{power_kind(sigma): power(sigma) for sigma in config.power_sigmas},
    }


def power_kind(sigma: float) -> str:
    """Returns the kind under which the power-function average of length `sigma` is stored."""
    return f"{MAIN_EMA}-power-{sigma:g}"


class ShardedEma:
    """The averages of this rank's master fragments.

    The fragments are those of the ZeRO partition, so all ranks together hold each average once.
    """

    def __init__(self, config: EmaConfig, masters: Sequence[Tensor]):
        self._decays = decays_of(config)
        self.averages: Mapping[str, list[Tensor]] = {
            kind: [master.detach().clone() for master in masters] for kind in self._decays
        }

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], *, step: int) -> None:
        """Moves the averages towards `masters`, after optimizer step `step` (counted from 1)."""
        targets = [master.detach() for master in masters]
        if not targets:
            return
        for kind, decay in self._decays.items():
            torch._foreach_lerp_(self.averages[kind], targets, 1 - decay(step))
