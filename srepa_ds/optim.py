"""The optimizer and its learning rate, both as the paper trains (Appendix A: AdamW, constant)."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from torch.nn import Parameter
from torch.optim import AdamW

from srepa_ds.schema import Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW and its learning rate schedule."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate after warmup."""

    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; the paper uses none."""

    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate grows linearly from zero; the paper uses none."""


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> AdamW:
    """Returns torch's AdamW over `parameters` as one group.

    One group, because DeepSpeed's ZeRO 1/2 links Adam's state correctly for the first group only.
    """
    parameters = list(parameters)
    return AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=all(parameter.is_cuda for parameter in parameters),
    )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Returns the learning rate of optimizer step `step` (counted from 0).

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    return config.learning_rate
