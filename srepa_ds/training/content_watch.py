"""Stops a run when the background check finds damaged data, and names the steps that read it."""

import os
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch

from srepa_ds.data.contents import ContentCheck, Damage
from srepa_ds.data.loader import DataOrder, steps_that_read
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.errors import DataError


def is_first_on_machine() -> bool:
    """Returns whether this rank reads for all ranks of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@runtime_checkable
class Progress(Protocol):
    """The part of an engine that tells how far a training is."""

    step_count: int
    samples_seen: int


class ContentWatch:
    """Runs a content check beside a training, on one rank of each machine.

    A context manager; without a check, which small data need not, it does nothing.
    """

    def __init__(
        self,
        check: ContentCheck | None,
        dataset: ShardDataset,
        engine: Progress,
        *,
        seed: int,
        batch_size: int,
    ):
        self._check = check
        self._dataset = dataset
        self._engine = engine
        self._seed = seed
        self._batch_size = batch_size
        self._first_step = engine.step_count
        self._first_position = engine.samples_seen

    def __enter__(self) -> "ContentWatch":
        if self._check is not None and is_first_on_machine():
            self._check.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._check is not None:
            self._check.close()

    def look(self) -> None:
        """Raises DataError on all ranks if one of them has found a damaged file. Collective."""
        if self._check is not None:
            ranks.together(self._raise_damage, self._check)

    def _raise_damage(self, check: ContentCheck) -> None:
        damage = check.failure()
        if damage is not None:
            raise DataError(f"{damage.message}{self._steps(damage)}")

    def _steps(self, damage: Damage) -> str:
        """Returns which steps have read a damaged file, for a message."""
        samples = self._dataset.samples_in(damage.path)
        if samples is None:
            return ""
        first, seen = self._first_step, self._engine.samples_seen - self._first_position
        if seen != (self._engine.step_count - first) * self._batch_size:
            # A rollback counts its steps again, with other samples.
            return f"\nsteps from {first + 1} on may have read it, and so have their checkpoints"
        steps = steps_that_read(
            DataOrder(seed=self._seed, num_samples=len(self._dataset)),
            samples,
            positions=range(self._first_position, self._engine.samples_seen),
            batch_size=self._batch_size,
            first_step=first,
        )
        return f"\n{_told(steps)}" + (f"; steps before {first + 1} are not known" if first else "")


def _told(steps: torch.Tensor) -> str:
    if len(steps) == 0:
        return "no step has read it"
    start, end = int(steps[0]), int(steps[-1])
    which = f"step {start}" if len(steps) == 1 else f"{len(steps)} steps from {start} to {end}"
    return f"{which} read it; checkpoints from step {start} on have learnt from it"
