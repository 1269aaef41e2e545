"""What one rank meets while it looks at images ends the others soon, or when they may end."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_function

from srepa_ds.config.sections import EvaluateConfig
from srepa_ds.distributed import ranks
from srepa_ds.encoders.extractors import ExtractorConfig
from srepa_ds.encoders.features import Features
from srepa_ds.errors import DataError
from srepa_ds.evaluation.evaluator import Evaluator, Judge
from srepa_ds.evaluation.images import ImageBlock
from srepa_ds.evaluation.reference import ReferenceImages, StoredStatistics

SIZE, BLOCKS = 4, 100


class Means:
    """Gives the mean of each channel; refuses images that are all black."""

    width, spatial_width, num_classes = 3, None, 0
    identity: dict[str, Any] = {"name": "means"}

    def features(self, images):
        """Returns the means."""
        if not images.any():
            raise DataError("the images are black")
        return Features(images.float().mean((2, 3)), None)

    def to(self, device):
        """Returns itself: there are no weights."""
        return self


def evaluator(rank: ranks.Rank) -> Evaluator:
    """Returns an evaluator that only sums features."""
    settings = EvaluateConfig(reference=Path("real"), extractor=ExtractorConfig(name="inception"))
    reference = ReferenceImages(None, StoredStatistics(None, None), "real")
    return Evaluator(settings, [Judge("means", Means(), ())], reference, rank=rank)


def blocks(rank: ranks.Rank, taken: list[int], *, black: int | None, seconds: float):
    """Yields this rank's blocks slowly, of which one may be black."""
    for number in range(BLOCKS):
        time.sleep(seconds)
        taken.append(number)
        images = torch.randint(1, 255, (SIZE, 3, 2, 2), dtype=torch.uint8)
        ids = torch.arange(SIZE) + SIZE * (number * rank.world_size + rank.number)
        yield ImageBlock(images * (number != black), None, ids)


def one_fails(failing: int, *, in_step: bool) -> tuple[int, str]:
    """Returns how many blocks this rank has taken, and the error that it raised."""
    rank, taken = ranks.initialize(), []
    own = blocks(rank, taken, black=0 if rank.number == failing else None, seconds=0.05)
    try:
        evaluator(rank).measure(own, SIZE * BLOCKS * rank.world_size, in_step=in_step)
    except DataError as error:
        return len(taken), str(error)
    return len(taken), "none"


def both_ways() -> list[Any]:
    """Returns what two ranks of independent blocks and two that draw in step return."""
    return [one_fails(1, in_step=False), one_fails(0, in_step=True)]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others():
    results = run_function(both_ways, 2)
    (slow, error), (failed, own_error) = (result[0] for result in results)
    assert error == own_error == "the images are black"
    # A failure is looked for twice a second, and a block takes a twentieth.
    assert failed == 1
    assert slow < BLOCKS / 2
    # Ranks that wait for each other in each block take all of them.
    for result in results:
        assert result[1] == [BLOCKS, "the images are black"]


def test_blocks_that_are_drawn_in_step_are_all_taken():
    try:
        assert one_fails(0, in_step=True) == (BLOCKS, "the images are black")
        assert one_fails(0, in_step=False) == (1, "the images are black")
    finally:
        ranks.close()


def late(seconds: float) -> float:
    """Returns how long this rank measured, of which the main one is done at once."""
    rank = ranks.initialize(timeout=timedelta(seconds=12))
    began = time.monotonic()
    own = blocks(rank, [], black=None, seconds=seconds * rank.number / BLOCKS)
    evaluator(rank).measure(own, SIZE * BLOCKS * rank.world_size)
    return time.monotonic() - began


@pytest.mark.slow
def test_a_slow_rank_is_waited_for_beyond_the_limit_of_a_collective():
    assert min(run_function(late, 2, 15.0)) > 14
