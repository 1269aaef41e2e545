"""Scores images against a reference, in the feature spaces of one or several extractors.

The images may lie in files or be drawn while they are scored; every rank sees a share of them.
"""

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.distributed.heartbeat import moved
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.features import Extractor
from srepa_ds.evaluation.collected import Collector, Kept, Seen
from srepa_ds.evaluation.images import ImageBlock, ImageSet, Stripe
from srepa_ds.evaluation.reference import ReferenceImages, evenly_spread
from srepa_ds.metrics.manifold import precision_by_class
from srepa_ds.metrics.scores import (
    METRICS,
    Conventions,
    FeatureKind,
    FeatureSet,
    Measured,
    Scores,
    measure,
    notes_on,
)
from srepa_ds.preparation.progress import run_through


@dataclass(frozen=True)
class Judge:
    """An extractor and the metrics that are computed with it."""

    label: str
    extractor: Extractor
    metrics: tuple[str, ...]

    def takes_rows(self, kind: FeatureKind) -> bool:
        """Returns whether a metric needs the features of that kind one by one."""
        return any(
            METRICS[name].takes_rows and METRICS[name].features == kind for name in self.metrics
        )


@dataclass(frozen=True)
class Result:
    """The scores of a set of images."""

    scores: Scores
    """In the feature space of `evaluate.extractor`."""
    further: dict[str, Scores]
    """In those of `evaluate.further_extractors`, by their labels."""
    reference_recognised: float | None
    """The share of the real images whose class the extractor predicts."""
    class_precision: dict[int, float]
    """By class, the fraction of its images inside the reference's manifold."""
    num_images: int
    """The number of images that were scored."""
    notes: list[str] = field(default_factory=list)
    """What keeps these scores from being comparable with others, and why some are missing."""


class Evaluator:
    """Scores sets of images against one reference. Collective, but for `judges`."""

    def __init__(
        self,
        settings: EvaluateConfig,
        judges: Sequence[Judge],
        reference: ReferenceImages,
        *,
        rank: Rank,
        remarks: Sequence[str] = (),
    ):
        """Takes what `open_evaluator` has opened and checked, and its `remarks` on the scores."""
        self.judges = tuple(judges)
        self.reference = reference
        self.remarks = tuple(remarks)
        self._settings = settings
        self._rank = rank
        self._device: torch.device | str = rank.device
        self._seen_reference: list[Seen] | None = None

    def to(self, device: torch.device | str) -> None:
        """Moves the extractors, which work where they are."""
        self._device = device
        for judge in self.judges:
            judge.extractor.to(device)

    def measure_set(self, images: ImageSet) -> Result:
        """Returns the scores of a set of images."""
        size = self._settings.batch_size
        stripe = Stripe(self._rank.number, self._rank.world_size)
        return self.measure(images.blocks(size, stripe), len(images))

    def measure(self, blocks: Iterable[ImageBlock], count: int, *, in_step: bool = False) -> Result:
        """Returns the scores of `count` images, of which `blocks` are this rank's.

        A rank that fails ends the others at their next block. With `in_step`, the ranks make
        their blocks by collectives, equally many each: all are taken, also after a failure.
        Raises DataError on all ranks if images are missing, cannot be read, or do not suffice.
        """
        reference = self._reference_features()
        numbers = torch.arange(count)
        labels: list[tuple[Tensor, Tensor]] = []

        def with_labels(blocks: Iterable[ImageBlock]) -> Iterable[ImageBlock]:
            for block in blocks:
                if block.labels is not None:
                    labels.append((block.sample_ids, block.labels))
                yield block

        seen = self._look(with_labels(blocks), numbers, count, "images", in_step=in_step)
        return ranks.on_main(self._scored, seen, reference, self._labels(labels, count), count)

    def see_reference(self) -> list[Seen]:
        """Returns the reference as each extractor has seen it, all its images for the sums."""
        return self._reference_features()

    def notes(self, count: int) -> list[str]:
        """Returns why distances over `count` images mean little, if they do."""
        found: list[str] = []
        for judge in self.judges:
            width, images = judge.extractor.width, self.reference.images
            is_stored = self._stored(judge) is not None
            real = width + 1 if is_stored or images is None else len(images)
            found += notes_on(samples=count, reference=real, width=width)
        return list(dict.fromkeys(found))

    def _scored(
        self, seen: list[Seen], reference: list[Seen], labels: Tensor | None, count: int
    ) -> Result:
        measured = [
            self._measured(judge, drawn, real)
            for judge, drawn, real in zip(self.judges, seen, reference, strict=True)
        ]
        inside = measured[0].in_reference
        return Result(
            scores=measured[0].scores,
            further={
                judge.label: one.scores
                for judge, one in zip(self.judges[1:], measured[1:], strict=True)
            },
            reference_recognised=reference[0].recognised,
            class_precision=(
                {} if inside is None or labels is None else precision_by_class(inside, labels)
            ),
            num_images=count,
            notes=[*self.notes(count), *self.remarks],
        )

    def _measured(self, judge: Judge, drawn: Seen, real: Seen) -> Measured:
        return measure(
            drawn.features,
            real.features,
            metrics=judge.metrics,
            class_accuracy=drawn.recognised if judge is self.judges[0] else None,
            conventions=Conventions(
                arithmetic=self._settings.distance_arithmetic
                or ("fp16" if judge.label == "inception" else "fp32")
            ),
        )

    def _stored(self, judge: Judge) -> FeatureSet | None:
        """Returns stored statistics, which are of Inception's features."""
        stored = self.reference.stored.pooled
        return FeatureSet(stored) if stored is not None and judge.label == "inception" else None

    def _reference_features(self) -> list[Seen]:
        if self._seen_reference is None:
            images, seen = self.reference.images, [Seen({}, None) for _ in self.judges]
            if images is not None and self._needs_reference_images():
                stripe = Stripe(self._rank.number, self._rank.world_size)
                blocks = images.blocks(self._settings.batch_size, stripe)
                wanted = evenly_spread(self._settings.num_manifold_images, len(images))
                seen = self._look(blocks, wanted, len(images), "reference images")
            pairs = zip(self.judges, seen, strict=True)
            self._seen_reference = [self._with_stored(judge, one) for judge, one in pairs]
        return self._seen_reference

    def _needs_reference_images(self) -> bool:
        """Returns whether anything is computed that the stored statistics do not give."""
        return any(
            METRICS[name].takes_reference
            and (METRICS[name].takes_rows or not self._is_stored(judge, METRICS[name].features))
            for judge in self.judges
            for name in judge.metrics
        )

    def _is_stored(self, judge: Judge, kind: FeatureKind) -> bool:
        return self._stored(judge) is not None and self.reference.stored.of(kind) is not None

    def _with_stored(self, judge: Judge, seen: Seen) -> Seen:
        pooled = self._stored(judge)
        if pooled is None:
            return seen
        rows = seen.features["pooled"].rows if "pooled" in seen.features else None
        features: dict[FeatureKind, FeatureSet] = dict(seen.features)
        features["pooled"] = FeatureSet(pooled.statistics, rows)
        if self.reference.stored.spatial is not None:
            features["spatial"] = FeatureSet(self.reference.stored.spatial)
        return Seen(features, seen.recognised)

    def _look(
        self,
        blocks: Iterable[ImageBlock],
        wanted: Tensor,
        count: int,
        what: str,
        *,
        in_step: bool = False,
    ) -> list[Seen]:
        """Returns the features of this rank's `blocks` and those of all other ranks."""
        collectors = [self._collector(judge, wanted, what) for judge in self.judges]
        run_through(self._counts(blocks, collectors, in_step=in_step), total=count, what=what)
        return [collector.seen(count) for collector in collectors]

    def _counts(
        self, blocks: Iterable[ImageBlock], collectors: list[Collector], *, in_step: bool
    ) -> Generator[int, None, None]:
        """Collects the features of this rank's blocks, and yields their numbers of images."""
        own = iter(blocks)
        try:
            for block in own:
                images = block.images.to(self._device)
                for judge, collector in zip(self.judges, collectors, strict=True):
                    collector.add(judge.extractor.features(images), block.sample_ids, block.labels)
                yield len(block.sample_ids)
        finally:
            # The other ranks wait for this one in each of its blocks.
            for _ in own if in_step else ():
                moved()

    def _collector(self, judge: Judge, wanted: Tensor, what: str) -> Collector:
        is_sample = what == "images"
        kept = Kept(
            spatial="spatial_frechet" in judge.metrics,
            pooled_rows=wanted if judge.takes_rows("pooled") else None,
            logit_rows=wanted if is_sample and judge.takes_rows("logits") else None,
        )
        extractor = judge.extractor
        return Collector(
            kept,
            width=extractor.width,
            spatial=extractor.spatial_width,
            classes=extractor.num_classes,
            # Inception's classes are not those of any data set here.
            compares_labels=judge.label != "inception",
            rank=self._rank,
        )

    def _labels(self, own: list[tuple[Tensor, Tensor]], count: int) -> Tensor | None:
        """Returns the label of every image on the main rank, None if there are not so many."""
        given = [pair for pairs in ranks.gather_on_main(own) for pair in pairs]
        if sum(len(ids) for ids, _ in given) != count:
            return None
        labels = torch.zeros(count, dtype=torch.int64)
        for ids, some in given:
            labels[ids] = some
        return labels
