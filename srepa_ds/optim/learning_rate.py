"""The learning rate at each step: warmup, then constant or half a cosine."""

import math

from srepa_ds.optim.adamw import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Returns the learning rate of optimizer step `step` (counted from 0).

    A pure function of the step, so that a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay_steps is None:
        return config.learning_rate
    # Only `cosine` has decay_steps, and they exceed the warmup.
    progress = (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps)
    share = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    lowest = config.minimum_learning_rate
    return lowest + (config.learning_rate - lowest) * share
