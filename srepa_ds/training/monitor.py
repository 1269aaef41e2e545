"""What a run looks like on the way: images of its EMA, and their distance from real ones.

The weights are swapped for their averages while it looks, all ranks draw equally many images, and
nobody waits for anybody longer than for one batch.
"""

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor

from srepa_ds.codec.latent_codec import LatentCodec
from srepa_ds.config.experiment import Config
from srepa_ds.data.shards import ShardDataset
from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.teacher import Teacher, load_teacher
from srepa_ds.engine import Engine
from srepa_ds.errors import DataError
from srepa_ds.interpolant import INTERPOLANTS
from srepa_ds.metrics.frechet import frechet_distance
from srepa_ds.metrics.statistics import FeatureStatistics
from srepa_ds.model.sit import SiTOutput
from srepa_ds.model.variants import SiTConfig
from srepa_ds.sampling.generate import ImageBatch, draw_labels, even_chunks, generate
from srepa_ds.sampling.sheet import SheetBuilder
from srepa_ds.sampling.solvers import SamplerConfig

# More real images than this change the statistics less than the drawn ones do.
_MOST_REAL_IMAGES = 10_000


class EngineModel:
    """The model inside an engine, for the sampler."""

    def __init__(self, engine: Engine, config: SiTConfig):
        self._engine = engine
        self.config = config

    def __call__(
        self, x_t: Tensor, t: Tensor, labels: Tensor, *, cls_t: Tensor | None = None
    ) -> SiTOutput:
        """Returns the velocity, and that of the class token if there is one. Collective."""
        return self._engine.predict(x_t, t, labels, cls_t)


class Monitor:
    """Looks at a run's EMA when its configuration says so. Every method is collective."""

    def __init__(self, config: Config, codec: LatentCodec, rank: Rank):
        """Raises DataError for a reference that is missing or of another size."""
        self._config = config
        self._codec = codec
        self._rank = rank
        self._real = _reference(config, codec) if config.monitor.evaluate_every_steps else None
        # Now, because a fault in it should not wait for the first evaluation.
        self._extractor = None if self._real is None else _extractor(config, self._real)
        self._real_statistics: FeatureStatistics | None = None

    def is_due(self, step: int, *, since: int) -> bool:
        """Returns whether there is anything to look at after optimizer step `step`.

        What fell due at a step after `since` that was skipped is still due.
        """
        return self._draws(step, since) or self._evaluates(step, since)

    def _draws(self, step: int, since: int) -> bool:
        every = self._config.monitor.images_every_steps
        return every > 0 and step // every > since // every

    def _evaluates(self, step: int, since: int) -> bool:
        every = self._config.monitor.evaluate_every_steps
        return every > 0 and step // every > since // every

    def look(
        self, engine: Engine, step: int, *, since: int
    ) -> tuple[Image.Image | None, dict[str, float]]:
        """Returns the contact sheet, on the main rank if one is due, and measured distances."""
        sheet, scores = None, {}
        with engine.averaged():
            if self._draws(step, since):
                sheet = self._sheet(engine)
            if self._evaluates(step, since):
                scores["frechet_distance"] = self._distance(engine)
        return sheet, scores

    def _sheet(self, engine: Engine) -> Image.Image | None:
        count = self._config.monitor.num_images
        # Where ranks are more than pictures, most have drawn some that nobody wants.
        own = [b for b in self._drawn(engine, count) if int(b.sample_ids[0]) < count]
        batches = ranks.gather_on_main(own)
        if not self._rank.is_main:
            return None
        ids = torch.arange(count)
        sampler, model = self._sampler(count), self._config.model
        builder = SheetBuilder(draw_labels(sampler, ids, num_classes=model.num_classes))
        in_order = sorted((b for drawn in batches for b in drawn), key=lambda b: b.chunk.index)
        for batch in in_order:
            wanted = batch.sample_ids < count
            builder.add(batch.images[wanted], batch.labels[wanted])
        return builder.image()

    def _distance(self, engine: Engine) -> float:
        count, device = self._config.monitor.num_evaluated, self._rank.device
        assert self._real is not None
        assert self._extractor is not None
        extractor = self._extractor.to(device)

        def seen(images: Tensor) -> Tensor:
            return extractor.classify(images.to(device)).pooled.cpu()

        if self._real_statistics is None:
            self._real_statistics = _over_ranks(map(seen, self._real_images(self._real)), device)
        drawn = (
            seen(batch.images[batch.sample_ids < count].permute(0, 3, 1, 2).contiguous())
            for batch in self._drawn(engine, count)
            if int(batch.sample_ids[0]) < count
        )
        drawn_statistics = _over_ranks(drawn, device)
        # Between looks its memory is the student's.
        self._extractor = extractor.cpu()
        real_statistics = self._real_statistics
        return ranks.on_main(lambda: frechet_distance(drawn_statistics, real_statistics))

    def _drawn(self, engine: Engine, count: int) -> Iterator[ImageBatch]:
        sampler = self._sampler(count)
        share = -(-count // self._rank.world_size)
        chunks = even_chunks(
            count,
            batch_size=min(sampler.batch_size, share),
            rank=self._rank.number,
            world_size=self._rank.world_size,
        )
        yield from generate(
            EngineModel(engine, self._config.model),
            self._codec,
            INTERPOLANTS[self._config.objective.interpolant.path],
            sampler,
            chunks=chunks,
            device=self._rank.device,
        )

    def _sampler(self, count: int) -> SamplerConfig:
        sample = self._config.sample
        num_steps = self._config.monitor.num_steps or sample.num_steps
        return sample.model_copy(update={"num_samples": count, "num_steps": num_steps})

    def _real_images(self, dataset: ShardDataset) -> Iterator[Tensor]:
        """Yields this rank's share of the real images, evenly spread over the data set."""
        assert self._config.evaluate is not None
        count = min(len(dataset), _MOST_REAL_IMAGES)
        chosen = torch.arange(count) * len(dataset) // count
        for indices in chosen[self._rank.number :: self._rank.world_size].split(
            self._config.evaluate.batch_size
        ):
            yield dataset.read(indices).pixels


def _reference(config: Config, codec: LatentCodec) -> ShardDataset:
    assert config.evaluate is not None
    dataset = ShardDataset(config.evaluate.reference)
    found = codec.latent_shape(dataset.image_shape)
    if found != config.model.latent_shape:
        raise DataError(
            f"{config.evaluate.reference} gives latents of shape {found}, the model draws "
            f"{config.model.latent_shape}; set evaluate.reference to images of the same size"
        )
    return dataset


def _extractor(config: Config, real: ShardDataset) -> Teacher:
    assert config.evaluate is not None
    return load_teacher(config.evaluate.extractor, resolution=real.image_shape[1:], device="cpu")


def _over_ranks(features: Iterator[Tensor], device: torch.device) -> FeatureStatistics:
    """Returns the statistics of all ranks' features, on the CPU of every rank. Collective."""
    own: FeatureStatistics | None = None
    for batch in features:
        own = (own or FeatureStatistics.empty(batch.shape[1])).updated(batch)
    # The main rank never comes away empty; others may, when there are few images.
    origin = ranks.broadcast(None if own is None else own.mean)
    assert origin is not None
    own = own or FeatureStatistics.empty(len(origin))
    sums = [ranks.summed(part.to(device)).cpu() for part in own.tensors(origin)]
    return FeatureStatistics.from_tensors(*sums, origin=origin)
