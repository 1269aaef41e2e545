import multiprocessing

import numpy as np
import pytest
import torch

from srepa_ds.data.loader import BatchLoader, DataConfig, DataOrder, epoch_permutation
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset

NUM_SAMPLES = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "shards"
    described = DatasetDescription({"name": "counted"}, (3, 2, 2), tuple("0123456789"))
    with ShardWriter(path, description=described, samples_per_shard=7) as writer:
        for number in range(NUM_SAMPLES):
            writer.add(np.full((2, 2, 3), number, dtype=np.uint8), number % 10)
    return path


def loader(folder, *, workers=0, **arguments):
    config = DataConfig(folder=folder, num_workers=workers, prefetch_batches=2)
    return BatchLoader(ShardDataset(folder), config, seed=5, **arguments)


def stream(folder, *, micro, world, accumulation, steps, start=0, workers=0):
    """Returns sample ids, positions and first pixels of whole global steps, in stream order."""
    rows = []
    for rank in range(world):
        with loader(
            folder,
            workers=workers,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
            accumulation=accumulation,
            start_position=start,
        ) as batches:
            taken = [next(batches) for _ in range(steps * accumulation)]
            assert batches.position == start + steps * micro * world * accumulation
        for batch in taken:
            columns = (batch.positions, batch.sample_ids, batch.labels, batch.images[:, 0, 0, 0])
            rows.append(torch.stack([column.long() for column in columns], dim=1))
    table = torch.cat(rows)
    return table[table[:, 0].argsort()]


def expected(start, stop):
    rows = []
    for position in range(start, stop):
        order = epoch_permutation(5, position // NUM_SAMPLES, NUM_SAMPLES)
        sample = int(order[position % NUM_SAMPLES])
        rows.append((position, sample, sample % 10, sample))
    return torch.tensor(rows)


def test_permutation_is_one_of_its_seed_and_epoch():
    orders = {
        (seed, epoch): epoch_permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)
    }
    for order in orders.values():
        assert torch.equal(order.sort().values, torch.arange(1000))
    values = list(orders.values())
    for first in range(4):
        assert torch.equal(values[first], epoch_permutation(*list(orders)[first], 1000))
        for second in range(first):
            # Two independent permutations agree in one place on average.
            assert (values[first] == values[second]).sum() < 10


def test_permutation_does_not_change_between_versions():
    assert epoch_permutation(3, 0, 8).tolist() == [2, 0, 3, 6, 7, 5, 4, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("micro", "world", "accumulation"), [(6, 1, 1), (3, 2, 1), (3, 1, 2), (1, 2, 3), (1, 3, 2)]
)
def test_stream_does_not_depend_on_how_the_batch_is_split(
    folder, micro, world, accumulation, workers
):
    steps = 6
    found = stream(
        folder, micro=micro, world=world, accumulation=accumulation, steps=steps, workers=workers
    )
    assert torch.equal(found, expected(0, 6 * steps))


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 2), (0, 4), (2, 2)])
@pytest.mark.parametrize("start", [8, 20, 23, 24, 1000 * NUM_SAMPLES + 5])
def test_resumes_anywhere_with_other_ranks_and_workers(folder, start, workers, world):
    found = stream(
        folder,
        micro=8 // world,
        world=world,
        accumulation=1,
        steps=4,
        start=start,
        workers=workers,
    )
    assert torch.equal(found, expected(start, start + 32))


def test_batch_larger_than_the_data_set(folder):
    found = stream(folder, micro=60, world=1, accumulation=1, steps=2, start=10)
    assert torch.equal(found, expected(10, 130))


def test_every_epoch_holds_every_sample_once(folder):
    found = stream(folder, micro=5, world=1, accumulation=1, steps=NUM_SAMPLES)
    for epoch in range(5):
        samples = found[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES, 1]
        assert torch.equal(samples.sort().values, torch.arange(NUM_SAMPLES))


def test_order_answers_positions_in_any_order():
    order = DataOrder(seed=1, num_samples=7)
    positions = torch.tensor([20, 0, 13, 6, 7, 0])
    one_by_one = [int(order.sample_at(positions[k : k + 1])) for k in range(len(positions))]
    assert DataOrder(seed=1, num_samples=7).sample_at(positions).tolist() == one_by_one


def test_closing_ends_the_workers_and_keeps_the_place(folder):
    batches = loader(folder, workers=2, micro_batch_size=4)
    first = next(batches).positions
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []
    assert first.tolist() == [0, 1, 2, 3]
    assert next(batches).positions.tolist() == [4, 5, 6, 7]
    batches.close()


def test_loading_draws_nothing_from_the_ambient_generator(folder):
    before = torch.random.get_rng_state()
    with loader(folder, micro_batch_size=4) as batches:
        next(batches)
    assert torch.equal(before, torch.random.get_rng_state())
