"""Turns batches into training inputs: latents, noise, and the teachers' tokens."""

import math
import time
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from srepa_ds.alignment.alignment import TermWeights
from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.config.experiment import Config
from srepa_ds.data.batch import Batch
from srepa_ds.data.stored_tokens import StoredTokens
from srepa_ds.encoders.teacher import Teacher, TeacherTokens
from srepa_ds.objective import TrainingInputs, draw_inputs
from srepa_ds.training.guarded import GuardedBatches
from srepa_ds.training.side_stream import SideStream, one_ahead


class Prepared(NamedTuple):
    """The inputs of one micro batch, and the facts that name its bad samples."""

    inputs: TrainingInputs
    sample_ids: Int64[Tensor, " batch"]
    finite: tuple[Bool[Tensor, " batch"] | None, ...]
    """Per alignment: whether each sample's teacher tokens are finite; read only on request."""


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
        """Takes one teacher per alignment, None where the batches hold its stored tokens instead.

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
        self._batches = GuardedBatches(batches)
        prepared = self._prepared()
        self._ready = one_ahead(prepared, ahead_on) if ahead_on else prepared

    def step(self) -> Iterator[TrainingInputs]:
        """Yields the micro batches of one optimizer step; the next call forgets them."""
        self._last_step = []
        for prepared in islice(self._ready, self._config.train.accumulation_steps):
            self._num_delivered += 1
            # The inputs are not kept: with accumulation they would pile up.
            self._last_step.append((prepared.sample_ids, prepared.finite))
            yield prepared.inputs

    def open(self) -> None:
        """Starts reading: returns once the first batch is there, raises DataError if it is not."""
        self._batches.open()

    @property
    def has_failed(self) -> bool:
        """Whether this rank cannot read its batches; its steps are not finite from then on."""
        return self._batches.failure is not None

    def raise_failure(self) -> None:
        """Raises the DataError that this rank has met, if any."""
        if self._batches.failure is not None:
            raise self._batches.failure

    def continue_at(self, step: int) -> None:
        """Counts the next micro batches from optimizer step `step` (from 0) on."""
        # A batch prepared ahead comes first, and keeps the weights of the step it was meant for.
        self._first_step = step
        self._num_prepared, self._num_delivered = self._num_prepared - self._num_delivered, 0

    def sample_ids(self) -> list[int]:
        """Returns this rank's samples of the last step. Waits for the device."""
        return [number for sample_ids, _ in self._last_step for number in sample_ids.tolist()]

    def waited(self) -> float:
        """Returns the seconds spent waiting for batches since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def unusable(self) -> dict[int, list[int]]:
        """Returns this rank's samples of the last step with tokens that are not finite.

        By alignment. Waits for the device, so call it only when a step has failed.
        """
        found: dict[int, list[int]] = {}
        for sample_ids, by_alignment in self._last_step:
            for number, finite in enumerate(by_alignment):
                if finite is not None and not bool(finite.all()):
                    ids = sample_ids[~finite].tolist()
                    found[number] = sorted({*found.get(number, []), *ids})
        return found

    def _prepared(self) -> Iterator[Prepared]:
        while True:
            asked_at = time.perf_counter()
            batch = next(self._batches, None)
            self._waited += time.perf_counter() - asked_at
            if batch is None:
                return
            step = self._first_step + self._num_prepared // self._config.train.accumulation_steps
            self._num_prepared += 1
            prepared = self._prepare(batch.to(self._device, non_blocking=True), step)
            yield _spoilt(prepared) if self.has_failed else prepared

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
        weights = tuple(alignment.weights_at(step) for alignment in config.alignments)
        tokens = self._tokens(batch, weights)
        inputs = drawn._replace(
            teacher_patches=tuple(None if t is None else t.patches for t in tokens),
            teacher_cls=tuple(None if t is None else t.cls for t in tokens),
            term_weights=weights,
        )
        finite = tuple(None if t is None else _finite(t) for t in tokens)
        return Prepared(inputs, batch.sample_ids, finite)

    def _tokens(
        self, batch: Batch, weights: tuple[TermWeights, ...]
    ) -> tuple[TeacherTokens | None, ...]:
        """Returns each teacher's tokens, None where neither a term nor the model needs them."""
        needed = [not terms.are_over for terms in weights]
        if self._config.model.class_token_width is not None:
            # The model carries the class token of the first teacher.
            needed[0] = True
        return tuple(
            _tokens_of(teacher, stored, batch) if is_needed else None
            for is_needed, teacher, stored in zip(
                needed, self._teachers, batch.teacher_tokens, strict=True
            )
        )


def _spoilt(prepared: Prepared) -> Prepared:
    """Returns inputs whose losses are not finite, so that no rank applies their step."""
    latents = torch.full_like(prepared.inputs.latents, math.nan)
    return prepared._replace(inputs=prepared.inputs._replace(latents=latents))


def _tokens_of(teacher: Teacher | None, stored: StoredTokens | None, batch: Batch) -> TeacherTokens:
    if stored is not None:
        return TeacherTokens(stored.patches_float32(), stored.cls)
    assert teacher is not None
    return teacher.tokens(batch.pixels)


def _finite(tokens: TeacherTokens) -> Bool[Tensor, " batch"]:
    patches = tokens.patches.isfinite().flatten(1).all(1)
    return patches if tokens.cls is None else patches & tokens.cls.isfinite().all(1)
