"""The exponential moving average of the weights: fp32, one shard per rank, no communication."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from srepa_ds.schema import Section


class EmaConfig(Section):
    """How the exponential moving average of the weights is kept."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Share of the average kept at each step (REPA: 0.9999)."""

    warmup: bool = False
    """Start as a running mean: use min(decay, 1 - 1 / (step + 1)). For short runs; the paper has
    none."""


def ema_decay(config: EmaConfig, step: int) -> float:
    """Returns the decay applied after optimizer step `step` (counted from 1)."""
    return min(config.decay, 1 - 1 / (step + 1)) if config.warmup else config.decay


class ShardedEma:
    """The average of this rank's master fragments.

    The fragments are those of the ZeRO partition, so all ranks together hold it exactly once.
    """

    def __init__(self, config: EmaConfig, masters: Sequence[Tensor]):
        self._config = config
        self.averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], *, step: int) -> None:
        """Moves the averages towards `masters`, after optimizer step `step` (counted from 1)."""
        if self.averages:
            torch._foreach_lerp_(
                self.averages,
                [master.detach() for master in masters],
                1 - ema_decay(self._config, step),
            )
