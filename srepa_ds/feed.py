"""From batches to what the objective needs: latents, noise, and the teachers' tokens."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from srepa_ds.alignment.teachers import Teacher, TeacherTokens
from srepa_ds.config import Config
from srepa_ds.data.batch import Batch
from srepa_ds.latent_codec import LatentCodec
from srepa_ds.objective import TrainingInputs, draw_inputs


@dataclass(frozen=True)
class Prepared:
    """The inputs of one micro batch, and what names its bad samples."""

    inputs: TrainingInputs
    sample_ids: Int64[Tensor, "batch"]
    finite: tuple[Bool[Tensor, "batch"] | None, ...]
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
    ):
        """`teachers` has one entry per alignment, None where stored tokens are read instead."""
        self._config = config
        self._codec = codec
        self._teachers = teachers
        self._device = device
        self._first_step = first_step
        self._last_step: list[tuple[Tensor, tuple[Tensor | None, ...]]] = []
        self._waited = 0.0
        self._count = 0
        overlapped = config.engine.overlap_teachers and device.type == "cuda"
        self._num_ahead = int(overlapped)
        self._is_scheduled = any(alignment.is_scheduled for alignment in config.alignments)
        prepared = self._prepared(batches)
        self._ready = _one_ahead(prepared, device) if overlapped else prepared

    def step(self) -> Iterator[TrainingInputs]:
        """Yields the micro batches of one optimizer step; the next call forgets them."""
        self._last_step = []
        for _ in range(self._config.train.accumulation_steps):
            prepared = next(self._ready)
            # Not its inputs: with accumulation they would pile up.
            self._last_step.append((prepared.sample_ids, prepared.finite))
            yield prepared.inputs

    def continue_at(self, step: int) -> None:
        """Takes what comes next as the micro batches of optimizer step `step` (from 0) and on."""
        # What is prepared ahead has the factors of an earlier step, and is delivered first.
        self._first_step, self._count = step, self._num_ahead

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
            step = self._first_step + self._count // self._config.train.accumulation_steps
            self._count += 1
            asked_at = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - asked_at
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


def _finite(tokens: TeacherTokens) -> Bool[Tensor, "batch"]:
    patches = tokens.patches.isfinite().flatten(1).all(1)
    return patches if tokens.cls is None else patches & tokens.cls.isfinite().all(1)


def _one_ahead(prepared: Iterator[Prepared], device: torch.device) -> Iterator[Prepared]:
    """Yields what `prepared` yields, each prepared on another stream while its predecessor is used.

    Whoever takes one has its stream wait for it, not the host.
    """
    stream = torch.cuda.Stream(device)
    # The weights it reads may still be on their way.
    stream.wait_stream(torch.cuda.current_stream(device))

    def launch() -> tuple[Prepared, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            item, ready = next(prepared), torch.cuda.Event()
            ready.record(stream)
        return item, ready

    ahead = launch()
    while True:
        item, ready = ahead
        ahead = launch()
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(ready)
        for tensor in _tensors((item.inputs, item.sample_ids, item.finite)):
            # Otherwise its memory could be given away while the consumer still reads it.
            tensor.record_stream(consumer)
        yield item


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _tensors(branch)
