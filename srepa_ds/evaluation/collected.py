"""The features of a set of images, summed and collected over ranks as they come.

Sums (Frechet distances) are the same for any number of ranks up to rounding. Rows (precision,
recall, kernel distance, inception score) are put in the order of the images' numbers, in whatever
order they come, so they do not depend on it at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.encoders.features import Features
from srepa_ds.errors import DataError
from srepa_ds.metrics.scores import Collected, FeatureKind, FeatureSet
from srepa_ds.metrics.statistics import FeatureStatistics

# Rows that are sent at once: 8 MiB of Inception's.
_ROWS_SENT = 1024


@dataclass(frozen=True)
class Kept:
    """Which features a measurement needs; sums of the pooled ones always."""

    spatial: bool = False
    """Sums of the spatial features."""
    pooled_rows: Int64[Tensor, " rows"] | None = None
    """Numbers of the images, ascending, whose pooled features are kept one by one."""
    logit_rows: Int64[Tensor, " logit_rows"] | None = None
    """The same for the logits."""


@dataclass(frozen=True)
class Seen:
    """A set of images as an extractor has seen it. Rows are on the main rank, empty elsewhere."""

    features: Collected
    """Sums and rows of each kind of features."""
    recognised: float | None
    """The share of images whose label the extractor predicts; None without labels or classes."""


class Rows:
    """Rows of a table by number, filled in any order, by all ranks, on the main rank."""

    def __init__(self, numbers: Int64[Tensor, " rows"], width: int, *, is_main: bool):
        """Makes room on the main rank for the rows `numbers`, which ascend."""
        self._numbers = numbers
        self._table = torch.empty(len(numbers), width) if is_main else None
        self._filled = torch.zeros(len(numbers) if is_main else 0, dtype=torch.bool)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, numbers: Int64[Tensor, " batch"], rows: Float[Tensor, "batch width"]) -> None:
        """Adds those of `rows` that are wanted."""
        places = torch.searchsorted(self._numbers, numbers).clamp(max=len(self._numbers) - 1)
        wanted = self._numbers[places] == numbers
        if self._table is None:
            self._waiting.append((places[wanted], rows[wanted].float()))
            return
        self._put(places[wanted], rows[wanted].float())

    def table(self) -> Float[Tensor, "rows width"] | None:
        """Returns the whole table on the main rank, None elsewhere. Collective.

        Raises DataError on the main rank if rows are missing.
        """
        pieces = _pieces(self._waiting)
        self._waiting = []
        while ranks.any_rank((piece := next(pieces, None)) is not None):
            for sent in ranks.gather_on_main(piece):
                if sent is not None:
                    self._put(*sent)
        if self._table is not None and not bool(self._filled.all()):
            missing = int((~self._filled).sum())
            raise DataError(f"{missing} of {len(self._filled)} images were not seen")
        return self._table

    def _put(self, places: Tensor, rows: Tensor) -> None:
        assert self._table is not None
        self._table[places] = rows
        self._filled[places] = True


def _pieces(waiting: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for places, rows in waiting:
        yield from zip(places.split(_ROWS_SENT), rows.split(_ROWS_SENT), strict=True)


class Collector:
    """Takes the features of images, batch by batch."""

    def __init__(
        self,
        kept: Kept,
        *,
        width: int,
        spatial: int | None,
        classes: int,
        compares_labels: bool,
        rank: Rank,
    ):
        """Takes the widths of the three kinds of features, and whether classes are the labels."""
        self._compares_labels = compares_labels
        self._rank = rank
        self._statistics = FeatureStatistics.empty(width)
        self._spatial = FeatureStatistics.empty(spatial) if kept.spatial and spatial else None
        self._pooled = _rows(kept.pooled_rows, width, rank)
        self._logits = _rows(kept.logit_rows, classes, rank)
        self._hits = self._asked = 0

    def add(
        self,
        features: Features,
        sample_ids: Int64[Tensor, " batch"],
        labels: Int64[Tensor, " batch"] | None,
    ) -> None:
        """Adds the features of the images `sample_ids`."""
        self._statistics = self._statistics.updated(features.pooled.cpu())
        if self._spatial is not None and features.spatial is not None:
            self._spatial = self._spatial.updated(features.spatial.cpu())
        if self._pooled is not None:
            self._pooled.add(sample_ids, features.pooled.cpu())
        if features.logits is None:
            return
        if self._logits is not None:
            self._logits.add(sample_ids, features.logits.cpu())
        if labels is not None and self._compares_labels:
            self._hits += int((features.logits.argmax(1).cpu() == labels).sum())
            self._asked += len(labels)

    def seen(self, count: int) -> Seen:
        """Returns the features of all ranks' images, which are `count`. Collective.

        Raises DataError on all ranks if images are missing, or came more than once.
        """
        pooled = _over_ranks(self._statistics, self._rank)
        ranks.together(_check_count, pooled.count, count)
        counts = torch.tensor([self._hits, self._asked], device=self._rank.device)
        hits, asked = ranks.summed(counts).tolist()
        features: dict[FeatureKind, FeatureSet] = {
            "pooled": FeatureSet(pooled, _table(self._pooled)),
            "logits": FeatureSet(None, _table(self._logits)),
        }
        if self._spatial is not None:
            features["spatial"] = FeatureSet(_over_ranks(self._spatial, self._rank))
        return Seen(features, hits / asked if asked else None)


def _check_count(found: int, count: int) -> None:
    if found < count:
        raise DataError(f"{count - found} of {count} images were not seen")
    if found > count:
        raise DataError(f"{found} images were seen, and the set has {count}")


def _table(rows: Rows | None) -> Tensor | None:
    return None if rows is None else ranks.together(rows.table)


def _rows(numbers: Tensor | None, width: int, rank: Rank) -> Rows | None:
    return None if numbers is None else Rows(numbers, width, is_main=rank.is_main)


def _over_ranks(own: FeatureStatistics, rank: Rank) -> FeatureStatistics:
    """Returns the statistics of all ranks' features, on the CPU of every rank. Collective."""
    # The first rank with features; there may be fewer images than ranks.
    means = ranks.gather(own.mean if own.count else None)
    origin = next((mean for mean in means if mean is not None), own.mean)
    sums = [ranks.summed(part.to(rank.device)).cpu() for part in own.tensors(origin)]
    return FeatureStatistics.from_tensors(*sums, origin=origin)
