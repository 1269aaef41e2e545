"""Monitors a run: draws images with its EMA, and measures their distance from real ones.

The weights are swapped for their averages in the meantime. Every rank draws the same number of
images, so ranks drift by at most one batch.
"""

import logging
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.config.sections import EvaluateConfig, MonitorConfig
from srepa_ds.data.contents import IndexedFile
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.engine import Engine
from srepa_ds.errors import DataError
from srepa_ds.evaluation.evaluator import Evaluator
from srepa_ds.evaluation.image_sets import ShardImages
from srepa_ds.evaluation.images import ImageBlock
from srepa_ds.evaluation.opening import open_evaluator
from srepa_ds.evaluation.reference import open_reference
from srepa_ds.interpolant import Interpolant
from srepa_ds.model.sit import SiTOutput
from srepa_ds.model.variants import SiTConfig
from srepa_ds.objective import SamplingInputs
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, draw_labels, even_chunks, generate
from srepa_ds.sampling.sheet import SheetBuilder
from srepa_ds.schema import replaced
from srepa_ds.training.heldout import HeldoutLoss

log = logging.getLogger("srepa_ds")

# More real images than this would change the statistics less than the drawn ones do.
_MOST_REAL_IMAGES = 10_000


class EngineModel:
    """The model inside an engine, as the sampler calls it."""

    def __init__(self, engine: Engine, config: SiTConfig):
        self._engine = engine
        self.config = config

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor, *, cls_t: Tensor | None = None
    ) -> SiTOutput:
        """Returns the velocity, and the class token's if there is one. Collective."""
        return self._engine.predict(SamplingInputs(x_t, t, labels, cls_t))


class Monitor:
    """Looks at a run's EMA at the configured steps. Every method is collective."""

    def __init__(
        self,
        config: MonitorConfig,
        *,
        model: SiTConfig,
        codec: LatentCodec,
        interpolant: Interpolant,
        sampler: SamplerConfig,
        evaluate: EvaluateConfig | None,
        heldout: HeldoutLoss | None,
        rank: Rank,
    ):
        """Raises DataError for a reference that is missing or of another size."""
        self._config = config
        self._heldout = heldout
        self._model = model
        self._codec = codec
        self._interpolant = interpolant
        steps = config.num_steps or sampler.num_steps
        # The reference has all classes, and runs are compared by these pictures.
        self._sampler = replaced(sampler, num_steps=steps, labels=None)
        self._rank = rank
        self._evaluator: Evaluator | None = None
        if config.evaluate_every_steps:
            assert evaluate is not None
            # Loaded now, so that a fault in it does not surface at the first evaluation.
            self._evaluator = _evaluator(config, evaluate, model, codec, rank)
            for sentence in self._evaluator.notes(config.num_evaluated) if rank.is_main else ():
                log.warning("distances during training: %s", sentence)

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hashes that the indices give for the reference and the held-out data."""
        reference = self._evaluator.reference.images if self._evaluator else None
        of_reference = reference.indexed_files if isinstance(reference, ShardImages) else ()
        return (*of_reference, *(self._heldout.indexed_files if self._heldout else ()))

    def is_due(self, step: int, *, since: int) -> bool:
        """Returns whether images or a distance are due after optimizer step `step`.

        Those that were due at a skipped step after `since` still are.
        """
        return any(due(step, since) for due in (self._draws, self._evaluates, self._holds_out))

    def _draws(self, step: int, since: int) -> bool:
        return _is_due(self._config.images_every_steps, step, since)

    def _evaluates(self, step: int, since: int) -> bool:
        return _is_due(self._config.evaluate_every_steps, step, since)

    def _holds_out(self, step: int, since: int) -> bool:
        return _is_due(self._config.heldout_every_steps, step, since)

    def look(
        self, engine: Engine, step: int, *, since: int
    ) -> tuple[Image.Image | None, dict[str, float]]:
        """Returns the contact sheet (on the main rank, if one is due) and the scores due."""
        sheet, scores = None, {}
        with engine.averaged():
            if self._draws(step, since):
                sheet = self._sheet(engine)
            if self._evaluates(step, since):
                scores["frechet_distance"] = self._distance(engine)
            if self._heldout is not None and self._holds_out(step, since):
                model = EngineModel(engine, self._model)
                scores["heldout_flow_loss"] = self._heldout.measure(model)
        return sheet, scores

    def _sheet(self, engine: Engine) -> Image.Image | None:
        count = self._config.num_images
        # Ranks draw equally many images, so some of them are not needed.
        own = [b for b in self._drawn(engine, count) if int(b.sample_ids[0]) < count]
        batches = ranks.gather_on_main(own)
        if not self._rank.is_main:
            return None
        ids = torch.arange(count)
        labels = draw_labels(self._sampler_for(count), ids, num_classes=self._model.num_classes)
        builder = SheetBuilder(labels)
        in_order = sorted((b for drawn in batches for b in drawn), key=lambda b: b.chunk.index)
        for batch in in_order:
            wanted = batch.sample_ids < count
            builder.add(batch.images[wanted], batch.labels[wanted])
        return builder.image()

    def _distance(self, engine: Engine) -> float:
        count = self._config.num_evaluated
        assert self._evaluator is not None
        self._evaluator.to(self._rank.device)
        blocks = (
            _wanted(batch, count)
            for batch in self._drawn(engine, count)
            if int(batch.sample_ids[0]) < count
        )
        distance = self._evaluator.measure(blocks, count, in_step=True).scores.frechet_distance
        # Between evaluations the student needs its memory.
        self._evaluator.to("cpu")
        assert distance is not None
        return distance

    def _drawn(self, engine: Engine, count: int) -> Iterator[ImageBatch]:
        sampler = self._sampler_for(count)
        share = -(-count // self._rank.world_size)
        chunks = even_chunks(
            count,
            batch_size=min(sampler.batch_size, share),
            rank=self._rank.number,
            world_size=self._rank.world_size,
        )
        yield from generate(
            EngineModel(engine, self._model),
            self._codec,
            self._interpolant,
            sampler,
            chunks=chunks,
            device=self._rank.device,
        )

    def _sampler_for(self, count: int) -> SamplerConfig:
        return replaced(self._sampler, num_samples=count)


def _is_due(every: int, step: int, since: int) -> bool:
    return every > 0 and step // every > since // every


def _wanted(batch: ImageBatch, count: int) -> ImageBlock:
    """Returns the images of a batch whose number is below `count`."""
    wanted = batch.sample_ids < count
    images = batch.images[wanted].permute(0, 3, 1, 2).contiguous()
    return ImageBlock(images, batch.labels[wanted], batch.sample_ids[wanted])


def _evaluator(
    config: MonitorConfig,
    evaluate: EvaluateConfig,
    model: SiTConfig,
    codec: LatentCodec,
    rank: Rank,
) -> Evaluator:
    """Returns what measures distances; raises DataError for a reference of another size."""
    images = open_reference(evaluate.reference, setting="evaluate.reference").images
    if images is None:
        raise DataError(
            f"evaluate.reference: {evaluate.reference} holds statistics without images, and "
            "images tell whether the model draws the same size; give real images"
        )
    found = codec.latent_shape(images.image_shape)
    if found != model.latent_shape:
        raise DataError(
            f"{evaluate.reference} gives latents of shape {found}, but the model draws "
            f"{model.latent_shape}; set evaluate.reference to images of the same size"
        )
    evaluator = open_evaluator(
        replaced(evaluate, further_extractors=()),
        image_shape=images.image_shape,
        count=config.num_evaluated,
        rank=rank,
        metrics=("frechet",),
        most_reference=_MOST_REAL_IMAGES,
    )
    evaluator.to("cpu")
    return evaluator
