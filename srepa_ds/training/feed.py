"""From batches to what the objective needs: latents, noise, and the teachers' tokens."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.config.experiment import Config
from srepa_ds.data.batch import Batch
from srepa_ds.encoders.teacher import Teacher, TeacherTokens
from srepa_ds.objective import TrainingInputs, draw_inputs
from srepa_ds.training.side_stream import SideStream, one_ahead


class Prepared(NamedTuple):
    """The inputs of one micro batch, and what names its bad samples."""

    inputs: TrainingInputs
    sample_ids: Int64[Tensor, " batch"]
    finite: tuple[Bool[Tensor, " batch"] | None, ...]
    """Per alignment: which samples' teacher tokens are finite; stays on the device until asked."""


class Feed:
    """An endless iterator of one rank's micro batches, ready for the objective."""

    def __init__(
        self,
        config: Config,
        batches: Iterator[Batch],
        codec: LatentCodec,
        teachers: tuple[Teacher | None, ...],
        *,
        device: torch.device,
        first_step: int,
        ahead_on: SideStream | None = None,
    ):
        """`teachers` has one entry per alignment, None where stored tokens are read instead.

        With `ahead_on`, each micro batch is prepared there while its predecessor is trained on.
        """
        self._config = config
        self._codec = codec
        self._teachers = teachers
        self._device = device
        self._first_step = first_step
        self._last_step: list[tuple[Tensor, tuple[Tensor | None, ...]]] = []
        self._waited = 0.0
        # Micro batches since `first_step`.
        self._num_prepared = self._num_delivered = 0
        self._is_scheduled = any(alignment.is_scheduled for alignment in config.alignments)
        prepared = self._prepared(batches)
        self._ready = one_ahead(prepared, ahead_on) if ahead_on else prepared

    def step(self) -> Iterator[TrainingInputs]:
        """Yields the micro batches of one optimizer step; the next call forgets them."""
        self._last_step = []
        for prepared in islice(self._ready, self._config.train.accumulation_steps):
            self._num_delivered += 1
            # Not its inputs: with accumulation they would pile up.
            self._last_step.append((prepared.sample_ids, prepared.finite))
            yield prepared.inputs

    def continue_at(self, step: int) -> None:
        """Takes what comes next as the micro batches of optimizer step `step` (from 0) and on."""
        # What is prepared ahead keeps the factors of the step it was meant for; it comes first.
        self._first_step = step
        self._num_prepared, self._num_delivered = self._num_prepared - self._num_delivered, 0

    def sample_ids(self) -> list[int]:
        """Returns the samples of the last step, of this rank alone. Waits for the device."""
        return [number for sample_ids, _ in self._last_step for number in sample_ids.tolist()]

    def waited(self) -> float:
        """Returns the seconds spent waiting for batches since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def unusable(self) -> dict[int, list[int]]:
        """Returns the samples of the last step whose teacher tokens are not finite, by alignment.

        Of this rank alone. Waits for the device, so ask only when a step has failed.
        """
        found: dict[int, list[int]] = {}
        for sample_ids, by_alignment in self._last_step:
            for number, finite in enumerate(by_alignment):
                if finite is not None and not bool(finite.all()):
                    ids = sample_ids[~finite].tolist()
                    found[number] = sorted({*found.get(number, []), *ids})
        return found

    def _prepared(self, batches: Iterator[Batch]) -> Iterator[Prepared]:
        while True:
            asked_at = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - asked_at
            if batch is None:
                return
            step = self._first_step + self._num_prepared // self._config.train.accumulation_steps
            self._num_prepared += 1
            yield self._prepare(batch.to(self._device, non_blocking=True), step)

    def _prepare(self, batch: Batch, step: int) -> Prepared:
        config = self._config
        latents = self._codec.encode(batch, seed=config.run.seed)
        drawn = draw_inputs(
            config.objective,
            config.model,
            latents,
            batch.labels,
            positions=batch.positions,
            seed=config.run.seed,
        )
        factors = tuple(tuple(alignment.factors_at(step)) for alignment in config.alignments)
        tokens = self._tokens(batch, factors)
        inputs = drawn._replace(
            teacher_patches=tuple(
                None if t is None or not any(f) else t.patches
                for t, f in zip(tokens, factors, strict=True)
            ),
            teacher_cls=tuple(None if t is None else t.cls for t in tokens),
            factors=factors if self._is_scheduled else None,
        )
        finite = tuple(None if t is None else _finite(t) for t in tokens)
        return Prepared(inputs, batch.sample_ids, finite)

    def _tokens(
        self, batch: Batch, factors: tuple[tuple[float, float], ...]
    ) -> tuple[TeacherTokens | None, ...]:
        """Returns each teacher's tokens, None where nobody needs them any more."""
        stored = iter(batch.teacher_tokens)
        found: list[TeacherTokens | None] = []
        for number, (factor, teacher) in enumerate(zip(factors, self._teachers, strict=True)):
            kept = next(stored) if teacher is None else None
            carried = number == 0 and self._config.model.class_token_width is not None
            if not any(factor) and not carried:
                found.append(None)
            elif kept is not None:
                found.append(TeacherTokens(kept.patches_float32(), kept.cls))
            else:
                assert teacher is not None
                found.append(teacher.tokens(batch.pixels))
        return tuple(found)


def _finite(tokens: TeacherTokens) -> Bool[Tensor, " batch"]:
    patches = tokens.patches.isfinite().flatten(1).all(1)
    return patches if tokens.cls is None else patches & tokens.cls.isfinite().all(1)
