"""Stores of tokens beside shards: written in pieces, read in any order, damage named."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from srepa_ds.data.headers import header_facts, metadata_of
from srepa_ds.data.loader import BatchLoader, DataConfig
from srepa_ds.data.shard_index import INDEX_NAME, DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.stored_tokens import as_stored
from srepa_ds.data.token_index import TokenDescription, token_file_name
from srepa_ds.data.token_store import TokenStore
from srepa_ds.data.token_writer import TokenStoreWriter
from srepa_ds.errors import DataError

COUNT, PER_SHARD, GRID, WIDTH = 23, 7, (3, 5), 3


def write_images(folder, *, name="counted", offset=0):
    described = DatasetDescription({"name": name}, (3, 2, 2), tuple("0123456789"))
    with ShardWriter(folder, description=described, samples_per_shard=PER_SHARD) as writer:
        for number in range(COUNT):
            writer.add(np.full((2, 2, 3), number + offset, dtype=np.uint8), number % 10)
    return ShardDataset(folder)


def live_tokens(samples, scale=1.0):
    """Returns patches and class tokens that differ from sample to sample."""
    generator = torch.Generator().manual_seed(8)
    patches = torch.randn(COUNT, GRID[0] * GRID[1], WIDTH, generator=generator) * scale
    cls = torch.randn(COUNT, WIDTH, generator=generator)
    return patches[samples], cls[samples]


def described(dataset, storage, has_cls):
    return TokenDescription(
        dataset_id=dataset.index.dataset_id,
        teacher={"name": "test"},
        storage=storage,
        grid=GRID,
        width=WIDTH,
        has_cls=has_cls,
    )


def writer_of(dataset, folder, storage="int8", has_cls=True):
    return TokenStoreWriter(folder, described(dataset, storage, has_cls), dataset.index.shards)


def write_store(dataset, folder, *, storage="int8", has_cls=True, piece=3, scale=1.0):
    """Writes a whole store, `piece` samples at a time."""
    folder.mkdir(parents=True)
    writer, start = writer_of(dataset, folder, storage, has_cls), 0
    for number, shard in enumerate(dataset.index.shards):
        rows = range(start, start + shard.num_samples)
        pieces = []
        for first in range(rows.start, rows.stop, piece):
            patches, cls = live_tokens(slice(first, min(first + piece, rows.stop)), scale)
            pieces.append(as_stored(patches, cls if has_cls else None, storage=storage))
        writer.write(number, iter(pieces))
        start = rows.stop
    writer.finish(writer.entry(number) for number in reversed(range(len(writer.shards))))
    return folder


@pytest.fixture
def dataset(tmp_path):
    return write_images(tmp_path / "shards")


@pytest.fixture
def store(dataset):
    return write_store(dataset, dataset.folder / "teachers" / "test")


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("piece", [1, 3, 7])
def test_what_was_written_is_read_across_shards(dataset, storage, has_cls, piece):
    folder = dataset.folder / "store"
    write_store(dataset, folder, storage=storage, has_cls=has_cls, piece=piece)
    opened = TokenStore(folder)
    opened.check_fits(dataset.index, dataset.folder)
    opened.verify()
    assert (opened.grid, opened.width) == (GRID, WIDTH)
    indices = torch.tensor([22, 0, 6, 7, 6, 13, 14, 21])
    patches, cls = live_tokens(indices)
    expected = as_stored(patches, cls if has_cls else None, storage=storage)
    found = opened.read(indices)
    assert set(found.named_tensors()) == set(expected.named_tensors())
    for name, tensor in expected.named_tensors().items():
        assert torch.equal(getattr(found, name), tensor), name


def test_files_are_ordinary_safetensors_of_the_announced_size(dataset, store):
    writer = writer_of(dataset, store)
    for number, shard in enumerate(dataset.index.shards):
        path = store / token_file_name(number)
        assert path.stat().st_size == writer.num_bytes(number)
        tensors = load_file(path)
        count = shard.num_samples
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "patches": (count, 15, 3), "patches_scale": (count, 15), "cls": (count, 3),
        }  # fmt: skip
        with safe_open(path, framework="pt") as file:
            assert list(file.metadata()) == ["srepa_ds"]
            assert header_facts(file.metadata())["num_samples"] == count


def test_a_store_does_not_depend_on_the_pieces_it_was_written_in(dataset):
    folders = [dataset.folder / f"by-{piece}" for piece in (1, 4)]
    for folder, piece in zip(folders, (1, 4), strict=True):
        write_store(dataset, folder, piece=piece)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == [INDEX_NAME, *(token_file_name(number) for number in range(4))]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_batches_carry_the_tokens_of_every_store_in_order(dataset):
    stores = [
        TokenStore(write_store(dataset, dataset.folder / "a", storage="bf16", has_cls=False)),
        TokenStore(write_store(dataset, dataset.folder / "b", scale=5.0)),
    ]
    joined = ShardDataset(dataset.folder, stores)
    indices = torch.tensor([9, 2, 20])
    first, second = joined.read(indices).teacher_tokens
    assert torch.equal(first.patches, live_tokens(indices)[0].bfloat16())
    assert first.cls is None
    error = second.patches_float32() - live_tokens(indices, 5.0)[0]
    assert error.abs().max() <= 0.5001 * second.patches_scale.max()
    assert torch.equal(second.cls, live_tokens(indices)[1])
    assert dataset.read(indices).teacher_tokens == ()
    moved = joined.read(indices).to("meta")
    assert [tokens.patches.device.type for tokens in moved.teacher_tokens] == ["meta", "meta"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_delivers_tokens_of_its_own_images(dataset, store, workers):
    joined = ShardDataset(dataset.folder, [TokenStore(store)])
    config = DataConfig(folder=dataset.folder, num_workers=workers, prefetch_batches=2)
    with BatchLoader(joined, config, seed=1, micro_batch_size=5) as batches:
        for _ in range(6):
            batch = next(batches)
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.sample_ids)
            (tokens,) = batch.teacher_tokens
            expected = as_stored(*live_tokens(batch.sample_ids), storage="int8")
            assert torch.equal(tokens.patches, expected.patches)
            assert torch.equal(tokens.patches_scale, expected.patches_scale)
            assert torch.equal(tokens.cls, expected.cls)


def test_a_pickled_store_carries_no_tokens(store):
    opened = TokenStore(store)
    before = len(pickle.dumps(opened))
    opened.read(torch.arange(COUNT))
    assert len(pickle.dumps(opened)) == before < 10_000


@pytest.mark.parametrize("indices", [[-1], [COUNT]])
def test_index_outside_is_an_error(store, indices):
    with pytest.raises(IndexError):
        TokenStore(store).read(torch.tensor(indices))


def test_an_empty_request_is_answered(dataset, store):
    joined = ShardDataset(dataset.folder, [TokenStore(store)])
    (tokens,) = joined.read(torch.zeros(0, dtype=torch.int64)).teacher_tokens
    assert tokens.patches_float32().shape == (0, 15, 3)


def test_an_exception_leaves_no_file(dataset, tmp_path):
    def pieces():
        yield as_stored(*live_tokens(slice(0, 2)), storage="int8")
        raise DataError("not finite")

    with pytest.raises(DataError, match="not finite"):
        writer_of(dataset, tmp_path).write(0, pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_finished_files_are_recognised(dataset, store):
    writer, path = writer_of(dataset, store), store / token_file_name(0)
    first, *others = writer.shards
    about = writer.description
    shorter = (first.model_copy(update={"num_samples": 6}), *others)
    other_teacher = about.model_copy(update={"teacher": {"name": "other"}})
    assert writer.missing() == ()
    assert replace(writer, shards=shorter).missing() == (0,)
    assert replace(writer, description=other_teacher).missing() == (0, 1, 2, 3)
    assert writer_of(dataset, store, storage="bf16").missing() == (0, 1, 2, 3)
    assert writer_of(dataset, store / "none").missing() == (0, 1, 2, 3)
    with pytest.raises(DataError, match=r"tokens-00000\.safetensors: tokens of other images"):
        replace(writer, shards=(others[0],)).missing()
    path.write_bytes(path.read_bytes()[:-1])
    assert writer.missing() == (0,)


def no_index(folder):
    (folder / INDEX_NAME).unlink()


def edit_index(folder, **changes):
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def missing_file(folder):
    (folder / token_file_name(1)).unlink()


def truncated_file(folder):
    path = folder / token_file_name(2)
    path.write_bytes(path.read_bytes()[:-3])


def replace_file(folder, header=(), **tensors):
    path = folder / token_file_name(1)
    with safe_open(path, framework="pt") as file:
        facts = header_facts(file.metadata()) | dict(header)
    save_file(load_file(path) | tensors, path, metadata=metadata_of(facts))


FAULTS = {
    no_index: "index.json: missing, so these tokens are not finished; complete",
    lambda folder: (folder / INDEX_NAME).write_text("{"): "index.json: not readable as JSON",
    lambda folder: edit_index(folder, format="x"): "format 'srepa-ds teacher tokens', found 'x'",
    lambda folder: edit_index(folder, version=1): "expected version 2 of the format, found 1",
    lambda folder: edit_index(folder, storage="int4", gird=[1, 2]): r"(?s)2 faults.*storage.*gird",
    missing_file: r"tokens-00001.safetensors: missing, but the index names it; delete .*test and",
    truncated_file: "tokens-00002.safetensors: not a readable token file.*the index says",
    lambda folder: edit_index(
        folder, teacher={"name": "b"}
    ): "tokens-00000.*disagree about teacher",
    lambda folder: replace_file(folder, {"dataset_id": "0"}): "tokens-00001.*about dataset_id",
    lambda folder: replace_file(folder, {"shard_sha256": "0"}): "tokens-00001.*about shard_sha256",
    lambda folder: replace_file(folder, cls=torch.zeros(7, 4)): (
        r"tokens-00001.*disagree about cls: found \('F32', \(7, 4\)\), the index says"
    ),
    lambda folder: replace_file(folder, more=torch.zeros(7)): "disagree about bytes",
}


@pytest.mark.parametrize("spoil", FAULTS)
def test_a_damaged_store_is_refused_with_file_and_reason(store, spoil):
    spoil(store)
    with pytest.raises(DataError, match=FAULTS[spoil]):
        TokenStore(store)


def test_verify_finds_one_flipped_bit(store):
    path = store / token_file_name(3)
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DataError, match=r"tokens-00003\.safetensors: contents changed"):
        TokenStore(store).verify()


def test_tokens_of_other_images_are_refused(tmp_path, store):
    other = write_images(tmp_path / "other", name="other")
    with pytest.raises(DataError, match=rf"tokens of the data set .*, but {other.folder} is"):
        ShardDataset(other.folder, [TokenStore(store)])
    # The same description, but not the same pixels.
    changed = write_images(tmp_path / "changed", offset=1)
    with pytest.raises(DataError, match=r"tokens-00000\.safetensors: tokens of 7 images that are"):
        ShardDataset(changed.folder, [TokenStore(store)])


def test_tokens_of_other_shards_are_refused(dataset, store):
    index = json.loads((store / INDEX_NAME).read_text())
    edit_index(store, files=index["files"][:-1])
    with pytest.raises(DataError, match=r"tokens of 3 shards, but .* has 4"):
        ShardDataset(dataset.folder, [TokenStore(store)])
