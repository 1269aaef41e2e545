"""Means over the steps since the last log point, without waiting for the device."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from srepa_ds.distributed import ranks

log = logging.getLogger("srepa_ds")


@dataclass(frozen=True)
class WindowMeans:
    """The means over a window of steps, on the host."""

    tensors: Mapping[str, Tensor]
    """Means over the applied steps; empty if all were skipped."""

    skipped: int
    """Steps that were not applied."""

    step_seconds: float
    data_wait_share: float
    """Share of the time that this rank waited for its data."""

    def scalars(self) -> dict[str, float]:
        """Returns the means that are single numbers."""
        return {name: value.item() for name, value in self.tensors.items() if value.ndim == 0}


class Window:
    """Means of device tensors over the steps since the last log point, without a host sync."""

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._begin()

    def _begin(self) -> None:
        self._sums: Tensor | None = None
        self._applied = 0
        self._skipped = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def add(self, values: Mapping[str, Tensor], *, applied: bool = True) -> None:
        """Adds one step's tensors; every step gives the same names and shapes.

        Steps that were not applied are only counted.
        """
        if not applied:
            self._skipped += 1
            return
        flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
        self._shapes = {name: value.shape for name, value in values.items()}
        self._sums = flat if self._sums is None else self._sums + flat
        self._applied += 1

    def waited(self, seconds: float) -> None:
        """Adds time that a step had to wait for its data."""
        self._waited += seconds

    def close(self) -> "WindowMeans":
        """Returns the means over the window and all ranks, and starts a new window.

        Collective, and the only host sync of the window.
        """
        means = self._means()
        seconds = time.perf_counter() - self._began
        result = WindowMeans(
            means,
            skipped=self._skipped,
            step_seconds=seconds / (self._applied + self._skipped),
            data_wait_share=min(1.0, self._waited / seconds),
        )
        self._begin()
        return result

    def _means(self) -> dict[str, Tensor]:
        if self._sums is None:
            return {}
        means = ranks.averaged(self._sums / self._applied).cpu()
        parts = means.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of `step_seconds`."""
        paused_at = time.perf_counter()
        yield
        self._began += time.perf_counter() - paused_at
