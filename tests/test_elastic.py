"""A checkpoint of any ZeRO stage and number of ranks goes on under any other.

`workers/elastic.py` trains, saves and resumes; here it is judged.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_worker
from safetensors.torch import load_file

from srepa_ds.checkpoint.folder import step_folder
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.data.loader import epoch_permutation
from srepa_ds.data.shard_index import DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter

RANKS, STAGES = (1, 2, 4), (0, 1, 2, 3)
SAVED_STEP, LAST_STEP, BATCH, NUM_SAMPLES, SEED = 4, 7, 8, 23, 3
KINDS = ["ema", "ema-0.3", "ema-power-0.1", "exp_avg", "exp_avg_sq", "master"]
TOPOLOGIES = [f"{ranks}-{stage}" for ranks in RANKS for stage in STAGES]
# Every topology is a source twice and a target twice: once from the next stage of other ranks,
# once from two stages on.
PAIRS = [
    (TOPOLOGIES[(number + shift) % len(TOPOLOGIES)], target)
    for number, target in enumerate(TOPOLOGIES)
    for shift in (5, 10)
]

# Fourteen processes import torch and DeepSpeed before the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all topologies have trained, saved and resumed."""
    folder = tmp_path_factory.mktemp("elastic")
    description = DatasetDescription(
        source={"kind": "test"}, image_shape=(3, 4, 4), class_names=tuple("012345")
    )
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_SAMPLES, 4, 4, 3), dtype=np.uint8)
    with ShardWriter(folder / "shards", description=description, samples_per_shard=9) as writer:
        for number, image in enumerate(pixels):
            writer.add(image, number % 6)
    for ranks in RANKS:
        run_worker("elastic", ranks, folder, "save", *map(str, STAGES))
    for ranks in RANKS:
        cases = [
            f"{target.split('-')[1]}:{source}"
            for source, target in PAIRS
            if target.startswith(f"{ranks}-")
        ]
        run_worker("elastic", ranks, folder, "resume", *cases)
    return folder


def reader_of(folder: Path, step: int = SAVED_STEP) -> CheckpointReader:
    return CheckpointReader(step_folder(folder, step))


def state_of(reader: CheckpointReader, kind: str) -> torch.Tensor:
    return torch.cat([reader.tensor(kind, name).reshape(-1) for name in reader.names(kind)])


def assert_same_losses(found: Path, expected: Path) -> None:
    losses, uninterrupted = (
        load_file(f / "facts.safetensors")["losses"] for f in (found, expected)
    )
    assert losses.shape == (LAST_STEP - SAVED_STEP, 4)
    # The point-wise term is a mean of cosines of both signs, near zero.
    torch.testing.assert_close(losses[:, :2], uninterrupted[:, :2], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses, uninterrupted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_everything_arrives_to_the_bit(runs, source, target):
    saved, taken = reader_of(runs / source), reader_of(runs / f"{target}-from-{source}")
    assert saved.kinds() == taken.kinds() == KINDS
    for kind in KINDS:
        assert saved.names(kind) == taken.names(kind)
        assert torch.equal(state_of(saved, kind), state_of(taken, kind)), kind
    assert saved.state == taken.state
    files = sorted(path.name for path in taken.folder.glob("fragments-*"))
    assert len(files) == int(target[0])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_training_goes_on_as_if_uninterrupted(runs, source, target):
    uninterrupted, resumed = runs / source, runs / f"{target}-from-{source}"
    assert_same_losses(resumed, uninterrupted)
    start = state_of(reader_of(uninterrupted), "master")
    for kind in KINDS:
        expected = state_of(reader_of(uninterrupted, LAST_STEP), kind)
        found = state_of(reader_of(resumed, LAST_STEP), kind)
        scale = (expected - start).norm() if kind == "master" else expected.norm()
        assert (found - expected).norm() < 1e-5 * scale, kind


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_data_go_on_where_they_were(runs, source, target):
    positions = torch.arange(SAVED_STEP * BATCH, LAST_STEP * BATCH)
    orders = [epoch_permutation(SEED, epoch, NUM_SAMPLES) for epoch in range(3)]
    expected = torch.stack([positions, torch.cat(orders)[positions]], 1)
    for folder in (runs / source, runs / f"{target}-from-{source}"):
        assert torch.equal(load_file(folder / "facts.safetensors")["samples"], expected)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_what_is_compared_is_the_same_run_and_no_standstill(runs, topology):
    alone, shared = (load_file(runs / t / "facts.safetensors")["losses"] for t in ("1-0", topology))
    # From the first step on they round differently.
    torch.testing.assert_close(shared[:, :2], alone[:, :2], rtol=1e-4, atol=0)
    saved, last = reader_of(runs / topology), reader_of(runs / topology, LAST_STEP)
    seen = {kind: state_of(saved, kind) for kind in KINDS}
    for kind in KINDS:
        assert seen[kind].abs().min() < seen[kind].abs().max()
        assert not torch.equal(seen[kind], state_of(last, kind))
    assert len({tuple(value[:50].tolist()) for value in seen.values()}) == len(KINDS)
