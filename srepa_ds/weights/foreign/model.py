"""A model of another program, under this project's names and conventions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state, by official names."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int
    """Steps that Adam has applied."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """`lr`, `betas`, `eps` and `weight_decay`, as torch's AdamW calls them."""


@dataclass(frozen=True)
class ForeignModel:
    """What a file or folder of another program holds.

    Weights have the official REPA names and REPA's convention (t = 1 is noise), whatever they had
    there; `pos_embed` is left out. Tensors are mapped from the file and read when they are used.
    """

    path: Path
    """The file or folder."""

    layout: str
    """The row of `LAYOUTS` that it is of."""

    weights: Mapping[str, Mapping[str, Tensor]]
    """By kind: `ema`, `model`, or both; `model` alone for a plain state_dict."""

    optimizer: OptimizerState | None = None
    """None if the file has none, if it cannot be converted, or if it was not asked for."""

    step: int | None = None
    """Optimizer steps taken, if the file tells."""

    positions: Tensor | None = None
    """The file's position embedding, (1, tokens, width): it is computed here, not taken over, but
    tells the resolution."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the file tells of its training: the arguments of REPA's trainer, or a configuration."""

    notes: tuple[str, ...] = ()
    """What was changed or left out, for the user to read."""
