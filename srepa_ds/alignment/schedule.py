"""Schedules of an alignment term's weight over the training steps.

Alignment helps early and may hurt late, so a term can be stopped or faded out. Pure functions of
the step: a resumed run needs no state.
"""

import math
from typing import Annotated

from pydantic import Field, model_validator

from srepa_ds.schema import Section, one_of

SCHEDULES = {
    "constant": lambda progress: 1.0,
    "stop": lambda progress: 1.0 if progress < 1 else 0.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Name -> factor at a progress in [0, 1] between the schedule's first and last step."""


class ScheduleConfig(Section):
    """The factor of a term's weight, from 1 to 0 over training."""

    kind: Annotated[str, one_of("schedule", SCHEDULES)] = "constant"
    """`constant`; `stop` at `end_step`; `linear` or `cosine` decay from `start_step` to it."""

    start_step: int = Field(default=0, ge=0)
    """The last step with the full weight (linear, cosine)."""

    end_step: int | None = Field(default=None, ge=1)
    """The first step without the term; once all terms of an alignment have ended, its teacher no
    longer runs."""

    @model_validator(mode="after")
    def _has_an_end(self) -> "ScheduleConfig":
        if self.kind == "constant":
            if self.end_step is not None or self.start_step:
                raise ValueError("a constant weight has neither start_step nor end_step")
        elif self.end_step is None:
            raise ValueError(f"a '{self.kind}' schedule needs end_step")
        elif self.kind == "stop" and self.start_step:
            raise ValueError("a 'stop' schedule has an end_step and no start_step")
        elif self.start_step >= self.end_step:
            raise ValueError(f"start_step {self.start_step} is not before end_step {self.end_step}")
        return self


def weight_factor(config: ScheduleConfig, step: int) -> float:
    """Returns the factor, in [0, 1], of a term's weight at optimizer step `step` (from 0)."""
    if config.end_step is None:
        return 1.0
    progress = (step - config.start_step) / (config.end_step - config.start_step)
    return SCHEDULES[config.kind](min(1.0, max(0.0, progress)))
