"""Which training steps are timed: a row of a table each."""

from dataclasses import dataclass

MODES = {
    "sit": {},
    "repa": {"pointwise": {"weight": 0.5}},
    "srepa-mse": {"pointwise": {"weight": 1.0}, "structural": {"kind": "mse", "weight": 2.0}},
    "srepa-kl": {"pointwise": {"weight": 1.0}, "structural": {"kind": "kl", "weight": 0.5}},
}
PLAIN = "plain loop"


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    pixels: int
    mode: str
    batch: int
    teacher: str
    arrangement: str
    """`plain loop`, or settings of the engine's section, `remat.policy=full precision=bf16`."""
