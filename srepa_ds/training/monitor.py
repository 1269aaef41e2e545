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
from srepa_ds.data.shards import Parts, ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.extractors import load_extractor
from srepa_ds.engine import Engine
from srepa_ds.errors import DataError
from srepa_ds.interpolant import Interpolant
from srepa_ds.metrics.frechet import frechet_distance
from srepa_ds.metrics.scores import notes_on
from srepa_ds.metrics.statistics import FeatureStatistics
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
        self._real = self._extractor = None
        self._real_statistics: FeatureStatistics | None = None
        if config.evaluate_every_steps:
            assert evaluate is not None
            self._real = _reference(evaluate, model, codec)
            self._real_batch_size = evaluate.batch_size
            # Loaded now, so that a fault in it does not surface at the first evaluation.
            self._extractor = load_extractor(
                evaluate.extractor, resolution=self._real.image_shape[1:], device="cpu"
            )
            real = min(len(self._real), _MOST_REAL_IMAGES)
            counts = {"samples": config.num_evaluated, "reference": real}
            for sentence in notes_on(**counts, width=self._extractor.width) if rank.is_main else ():
                log.warning("distances during training: %s", sentence)

    @property
    def indexed_files(self) -> tuple[IndexedFile, ...]:
        """The hashes that the indices give for the reference and the held-out data."""
        sources = (self._real, self._heldout)
        return tuple(file for one in sources if one is not None for file in one.indexed_files)

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
        count, device = self._config.num_evaluated, self._rank.device
        assert self._real is not None
        assert self._extractor is not None
        extractor = self._extractor.to(device)

        def seen(images: Tensor) -> Tensor:
            return extractor.features(images.to(device)).pooled.cpu()

        if self._real_statistics is None:
            # A rank that cannot read its share must not leave the others waiting.
            real = ranks.together(list, map(seen, self._real_images(self._real)))
            self._real_statistics = _over_ranks(iter(real), device)
        drawn = (
            seen(batch.images[batch.sample_ids < count].permute(0, 3, 1, 2).contiguous())
            for batch in self._drawn(engine, count)
            if int(batch.sample_ids[0]) < count
        )
        drawn_statistics = _over_ranks(drawn, device)
        # Between evaluations the student needs its memory.
        self._extractor = extractor.to("cpu")
        return ranks.on_main(frechet_distance, drawn_statistics, self._real_statistics)

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

    def _real_images(self, dataset: ShardDataset) -> Iterator[Tensor]:
        """Yields this rank's share of the real images, evenly spread over the data set."""
        count = min(len(dataset), _MOST_REAL_IMAGES)
        chosen = torch.arange(count) * len(dataset) // count
        own = chosen[self._rank.number :: self._rank.world_size]
        for indices in own.split(self._real_batch_size):
            yield dataset.read(indices).pixels


def _is_due(every: int, step: int, since: int) -> bool:
    return every > 0 and step // every > since // every


def _reference(config: EvaluateConfig, model: SiTConfig, codec: LatentCodec) -> ShardDataset:
    dataset = ShardDataset(config.reference, parts=Parts(moments=False))
    dataset.require_images("the extractor of distances looks at images")
    found = codec.latent_shape(dataset.image_shape)
    if found != model.latent_shape:
        raise DataError(
            f"{config.reference} gives latents of shape {found}, but the model draws "
            f"{model.latent_shape}; set evaluate.reference to images of the same size"
        )
    return dataset


def _over_ranks(features: Iterator[Tensor], device: torch.device) -> FeatureStatistics:
    """Returns the statistics of all ranks' features, on the CPU of every rank. Collective."""
    own: FeatureStatistics | None = None
    for batch in features:
        own = (own or FeatureStatistics.empty(batch.shape[1])).updated(batch)
    # The main rank always has features; others may have none if there are few images.
    origin = ranks.broadcast(None if own is None else own.mean)
    assert origin is not None
    own = own or FeatureStatistics.empty(len(origin))
    sums = [ranks.summed(part.to(device)).cpu() for part in own.tensors(origin)]
    return FeatureStatistics.from_tensors(*sums, origin=origin)
