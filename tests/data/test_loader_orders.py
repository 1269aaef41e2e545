"""Every sample exactly once per epoch, in one order, however reading is split and interrupted."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_data import NUM_CLASSES, image, latent, write_data

from srepa_ds.data.loader import BatchLoader, DataConfig, epoch_permutation
from srepa_ds.data.mirror import is_mirrored
from srepa_ds.data.shards import ShardDataset

BATCH = 12
SIZES = (1, 7, 12, 25)
SPLITS = [
    (world, accumulation)
    for world in (1, 2, 3, 4)
    for accumulation in (1, 2, 3)
    if BATCH % (world * accumulation) == 0
]
SEED = 9
NO_WORKERS = st.just(0)


@dataclass(frozen=True)
class Part:
    """A stretch of training between two interruptions."""

    world: int
    accumulation: int
    workers: int
    steps: int
    lost: int
    """Micro batches that each rank has read when the part ends in the middle of a step."""


@st.composite
def parts(draw, workers=NO_WORKERS):
    world, accumulation = draw(st.sampled_from(SPLITS))
    return Part(
        world,
        accumulation,
        workers=draw(workers),
        steps=draw(st.integers(0, 4)),
        lost=draw(st.integers(0, accumulation - 1)),
    )


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orders")
    storages = ("webp", "raw", "png", "webp")
    return {
        count: ShardDataset(
            write_data(folder / str(count), count=count, storage=storage, samples_per_shard=5)
        )
        for count, storage in zip(SIZES, storages, strict=True)
    }


def rank_s_batches(dataset, part, rank, start, *, mirror):
    config = DataConfig(
        folder=dataset.folder, num_workers=part.workers, prefetch_batches=2, mirror=mirror
    )
    with BatchLoader(
        dataset,
        config,
        seed=SEED,
        micro_batch_size=BATCH // (part.world * part.accumulation),
        rank=rank,
        world_size=part.world,
        accumulation=part.accumulation,
        start_position=start,
    ) as loader:
        taken = [next(loader) for _ in range(part.steps * part.accumulation)]
        for _ in range(part.lost):
            next(loader)
        return taken, loader.position


def trained_on(dataset, course, *, start, mirror):
    """Returns the samples of all whole steps, ordered by position; checks where it can resume."""
    rows, position = [], start
    for part in course:
        ends = set()
        for rank in range(part.world):
            taken, end = rank_s_batches(dataset, part, rank, position, mirror=mirror)
            ends.add(end)
            rows += [row for batch in taken for row in rows_of(batch)]
        assert ends == {position + part.steps * BATCH}
        (position,) = ends
    return sorted(rows, key=lambda row: row[0])


def rows_of(batch):
    columns = (batch.positions, batch.sample_ids, batch.labels, batch.images, batch.moments)
    return [
        (int(p), int(s), int(label), pixels, moments)
        for p, s, label, pixels, moments in zip(*columns, strict=True)
    ]


def check(dataset, course, *, start, mirror):
    rows, count = trained_on(dataset, course, start=start, mirror=mirror), len(dataset)
    steps = sum(part.steps for part in course)
    assert [row[0] for row in rows] == list(range(start, start + steps * BATCH))
    for position, sample, label, pixels, moments in rows:
        epoch, place = divmod(position, count)
        assert sample == int(epoch_permutation(SEED, epoch, count)[place])
        assert label == sample % NUM_CLASSES
        turned = mirror and bool(is_mirrored(SEED, torch.tensor([position])))
        expected = torch.from_numpy(image(sample)).permute(2, 0, 1)
        assert torch.equal(pixels, expected.flip(2) if turned else expected)
        assert torch.equal(moments, latent(sample, mirrored=turned))
    for first in range(-(-start // count) * count, start + steps * BATCH - count + 1, count):
        epoch = [row[1] for row in rows[first - start : first - start + count]]
        assert sorted(epoch) == list(range(count))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    count=st.sampled_from(SIZES),
    course=st.lists(parts(), min_size=1, max_size=4),
    start=st.integers(0, 60),
    mirror=st.booleans(),
)
def test_every_sample_is_trained_on_once_per_epoch(datasets, count, course, start, mirror):
    check(datasets[count], course, start=start, mirror=mirror)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    count=st.sampled_from(SIZES),
    course=st.lists(parts(workers=st.integers(1, 2)), min_size=2, max_size=2),
    mirror=st.booleans(),
)
def test_workers_change_nothing(datasets, count, course, mirror):
    check(datasets[count], course, start=5, mirror=mirror)
