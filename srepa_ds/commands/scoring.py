"""Shared by the commands that score images: blocks of drawn images, checks of small data sets."""

import logging
from collections.abc import Iterator

from srepa_ds.distributed import ranks
from srepa_ds.distributed.ranks import Rank
from srepa_ds.drawing.drawing import Drawing
from srepa_ds.evaluation.evaluator import Evaluator
from srepa_ds.evaluation.image_sets import ShardImages
from srepa_ds.evaluation.images import ImageBlock, ImageSet, Stripe

log = logging.getLogger("srepa_ds")


def drawn_blocks(drawing: Drawing, rank: Rank) -> Iterator[ImageBlock]:
    """Yields this rank's images of a drawing, as they are drawn."""
    stripe = Stripe(rank.number, rank.world_size)
    own = [chunk for chunk in drawing.chunks if stripe.has(chunk.index)]
    for batch in drawing.batches(own):
        images = batch.images.permute(0, 3, 1, 2).contiguous()
        yield ImageBlock(images, batch.labels, batch.sample_ids)


def compare_small(evaluator: Evaluator, *images: ImageSet) -> None:
    """Compares small data sets with their indices, and logs the remarks.

    Collective; raises DataError on all ranks.
    """
    for one in (evaluator.reference.images, *images):
        if isinstance(one, ShardImages):
            ranks.on_main(one.dataset.compare_if_small)
    for sentence in evaluator.remarks:
        log.info("%s", sentence)
