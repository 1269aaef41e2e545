"""AdamW: its settings, by default as the paper trains (Appendix A), and how it is built."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch.nn import Parameter
from torch.optim import AdamW

from srepa_ds.schema import MayChange, OnlyFor, Section

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

    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after warmup: constant, as in the paper, or half a cosine down to
    `minimum_learning_rate` at step `decay_steps`."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate grows linearly from zero; the paper uses none."""

    decay_steps: Annotated[int | None, OnlyFor("schedule", "cosine")] = Field(default=None, ge=1)
    """For `cosine`: the step, warmup included, at which the learning rate reaches its minimum."""

    minimum_learning_rate: Annotated[float, OnlyFor("schedule", "cosine")] = Field(
        default=0.0, ge=0
    )
    """For `cosine`: the learning rate from `decay_steps` on."""

    cpu_adam: Annotated[Literal["torch", "deepspeed"], MayChange] = "torch"
    """The AdamW for weights offloaded to the CPU. `torch`: its fused kernel; resumes to the bit.
    `deepspeed`: DeepSpeedCPUAdam, which a C++ compiler builds at its first use; no faster where
    both were measured, and after a resume it differs in the last bits."""

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> "OptimizerConfig":
        if self.schedule == "constant":
            return self
        if self.decay_steps is None or self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule: cosine needs decay_steps beyond warmup_steps {self.warmup_steps}"
            )
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                f"minimum_learning_rate {self.minimum_learning_rate:g} is above learning_rate "
                f"{self.learning_rate:g}"
            )
        return self


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> AdamW:
    """Returns torch's AdamW over `parameters` as one group, with one kernel for a whole step.

    One group, because DeepSpeed's ZeRO 1/2 links Adam's state correctly for the first group only.
    """
    return AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        # On a CPU too: 10 times faster than the loop over weights (24 ms per 30 million).
        fused=True,
    )
