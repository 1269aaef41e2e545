import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from srepa_ds.data.headers import metadata_of
from srepa_ds.data.prepared_folder import MARKER_NAME, prepared_index
from srepa_ds.data.shard_file import shard_facts
from srepa_ds.data.shard_index import INDEX_NAME, DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError, OutputError

SHAPE = (3, 4, 6)
DESCRIBED = DatasetDescription({"name": "test", "seed": 1}, SHAPE, ("zero", "one", "two"))


def pixels(number):
    values = np.arange(4 * 6 * 3).reshape(4, 6, 3) + 7 * number
    return (values % 256).astype(np.uint8)


def write(folder, count=11, described=DESCRIBED, samples_per_shard=4):
    with ShardWriter(folder, description=described, samples_per_shard=samples_per_shard) as writer:
        for number in range(count):
            writer.add(pixels(number), number % 3)
        writer.attach("note.txt", b"beside")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit_index(folder, **changes):
    path = folder / INDEX_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "deep" / "data")


def test_what_was_written_is_read(folder):
    dataset = ShardDataset(folder)
    assert (len(dataset), dataset.num_classes, dataset.image_shape) == (11, 3, SHAPE)
    assert [entry.num_samples for entry in dataset.index.shards] == [4, 4, 3]
    indices = torch.tensor([10, 0, 3, 4, 3, 8, 7])
    batch = dataset.read(indices, positions=indices + 100)
    expected = np.stack([pixels(k).transpose(2, 0, 1) for k in indices.tolist()])
    assert torch.equal(batch.images, torch.from_numpy(expected))
    assert batch.labels.tolist() == [k % 3 for k in indices.tolist()]
    assert torch.equal(batch.sample_ids, indices)
    assert torch.equal(batch.positions, indices + 100)
    assert dataset.labels.tolist() == [k % 3 for k in range(11)]
    dataset.verify()


def test_only_finished_files_remain(folder):
    shards = [f"shard-0000{k}.safetensors" for k in range(3)]
    assert names(folder) == sorted([INDEX_NAME, "note.txt", *shards])


@pytest.mark.parametrize("indices", [[-1], [11], [0, 99]])
def test_index_outside_is_an_error(folder, indices):
    with pytest.raises(IndexError):
        ShardDataset(folder).read(torch.tensor(indices))


def test_reads_an_empty_request(folder):
    assert len(ShardDataset(folder).read(torch.zeros(0, dtype=torch.int64))) == 0


def test_the_writer_keeps_no_reference_to_the_caller_s_image(tmp_path):
    image = pixels(0)
    with ShardWriter(tmp_path / "a", description=DESCRIBED, samples_per_shard=8) as writer:
        writer.add(image, 0)
        image[:] = 0
    batch = ShardDataset(tmp_path / "a").read(torch.tensor([0]))
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), pixels(0))


def test_a_pickled_data_set_carries_no_pixels(folder):
    dataset = ShardDataset(folder)
    before = len(pickle.dumps(dataset))
    dataset.read(torch.arange(11))
    assert len(pickle.dumps(dataset)) == before
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again.read(torch.arange(11)).labels, dataset.labels)


def long_name(folder):
    return folder / ("x" * 300)


def null_character(folder):
    return folder / "a\0b"


def no_folder(folder):
    return folder / "nowhere"


def no_index(folder):
    (folder / INDEX_NAME).unlink()
    return folder


def broken_index(folder):
    (folder / INDEX_NAME).write_text('{"format": "srepa')
    return folder


def foreign_index(folder):
    (folder / INDEX_NAME).write_text('["other"]')
    return folder


def future_index(folder):
    edit_index(folder, version=3)
    return folder


def incomplete_index(folder):
    edit_index(folder, num_samples="many", class_name=3)
    return folder


def wrong_sum(folder):
    edit_index(folder, num_samples=12)
    return folder


def no_samples(folder):
    edit_index(folder, num_samples=0, shards=[])
    return folder


def wrong_class_names(folder):
    edit_index(folder, num_classes=5)
    return folder


def missing_shard(folder):
    (folder / "shard-00001.safetensors").unlink()
    return folder


def replace_shard(folder, **changes):
    path = folder / "shard-00001.safetensors"
    tensors = load_file(path) | changes.pop("tensors", {})
    facts = shard_facts(4, SHAPE, DESCRIBED.dataset_id) | changes
    save_file(tensors, path, metadata=metadata_of(facts))
    return folder


def empty_shard(folder):
    empty = {
        "images": torch.zeros(0, *SHAPE, dtype=torch.uint8),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    return replace_shard(folder, tensors=empty, num_samples=0)


def zero_bytes(folder):
    (folder / "shard-00001.safetensors").write_bytes(b"")
    return folder


def truncated_shard(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    return folder


def garbage_header(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + bytes(200))
    return folder


def other_count(folder):
    tensors = {
        "images": torch.zeros(2, *SHAPE, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    return replace_shard(folder, tensors=tensors, num_samples=2)


def lying_header(folder):
    tensors = {
        "images": torch.zeros(2, *SHAPE, dtype=torch.uint8),
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    return replace_shard(folder, tensors=tensors)


def other_shape(folder):
    tensors = {"images": torch.zeros(4, 3, 6, 4, dtype=torch.uint8)}
    return replace_shard(folder, tensors=tensors)


def other_dtype(folder):
    return replace_shard(folder, tensors={"labels": torch.zeros(4, dtype=torch.int32)})


def no_header(folder):
    path = folder / "shard-00001.safetensors"
    save_file(load_file(path), path)
    return folder


def other_data_set(folder):
    return replace_shard(folder, dataset_id="0123456789abcdef")


def longer_file(folder):
    return replace_shard(folder, comment="x" * 64)


FAULTS = {
    long_name: "File name too long; make it readable, or correct the path",
    null_character: "null (byte|character)|no such data folder",
    no_folder: "no such data folder.*srepa-ds prepare",
    no_index: "index.json: missing, so this is not a finished data set",
    broken_index: "index.json: not readable as JSON",
    foreign_index: "expected an index of format 'srepa-ds shards', found 'list'",
    future_index: "expected version 1 or 2 of the format, found 3",
    incomplete_index: r"(?s)2 faults.*num_samples.*class_name: unknown key",
    wrong_sum: "says 12 samples, but its shards hold 11",
    no_samples: "holds no samples",
    wrong_class_names: "says 5 classes and names 3",
    missing_shard: "shard-00001.safetensors: missing, but the index names it",
    empty_shard: "shard-00001.safetensors: an empty shard; the index says 4 samples",
    zero_bytes: "shard-00001.safetensors: not a readable shard.*it has 0 bytes, the index says",
    truncated_shard: "shard-00001.safetensors: not a readable shard",
    garbage_header: "shard-00001.safetensors: not a readable shard",
    other_count: "disagree about num_samples: found 2, the index says 4",
    lying_header: r"disagree about images: found \('U8', \(2, 3, 4, 6\)\), the index says",
    other_shape: r"disagree about images: found \('U8', \(4, 3, 6, 4\)\), the index says",
    other_dtype: r"disagree about labels: found \('I32', \(4,\)\)",
    no_header: "disagree about format: found None",
    other_data_set: "disagree about dataset_id: found 0123456789abcdef",
    longer_file: "the size of this shard and the index disagree about bytes",
}


@pytest.mark.parametrize("spoil", FAULTS)
def test_a_damaged_data_set_is_refused_with_file_and_reason(folder, spoil):
    with pytest.raises(DataError, match=FAULTS[spoil]) as caught:
        ShardDataset(spoil(folder))
    cured_otherwise = (foreign_index, long_name, null_character)
    assert "srepa-ds prepare" in str(caught.value) or spoil in cured_otherwise


def test_verify_finds_one_flipped_bit(folder):
    path = folder / "shard-00002.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    dataset = ShardDataset(folder)
    with pytest.raises(DataError, match=r"shard-00002\.safetensors: contents changed"):
        dataset.verify()


def test_verify_finds_a_label_without_class(tmp_path):
    described = DatasetDescription(DESCRIBED.source, SHAPE, ("zero", "one"))
    dataset = ShardDataset(write(tmp_path / "a", described=described))
    with pytest.raises(DataError, match="labels run from 0 to 2, expected 0 to 1"):
        dataset.verify()


def write_and_raise(folder, error):
    with ShardWriter(folder, description=DESCRIBED, samples_per_shard=2) as writer:
        for number in range(5):
            writer.add(pixels(number), 0)
        writer.attach("note.txt", b"beside")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error):
        write_and_raise(tmp_path / "new" / "data", error)
    assert names(tmp_path) == []


def test_an_exception_leaves_an_existing_folder_empty(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_and_raise(tmp_path, ZeroDivisionError)
    assert names(tmp_path) == []


def test_a_killed_preparation_is_not_a_data_set_and_is_started_over(tmp_path):
    target = tmp_path / "data"
    writer = ShardWriter(target, description=DESCRIBED, samples_per_shard=2)
    writer.__enter__()
    for number in range(5):
        writer.add(pixels(number), 0)
    (target / "shard-00002.safetensors.partial").write_bytes(b"half")
    # Here the process is killed: no __exit__, but its locks are released.
    del writer
    with pytest.raises(DataError, match="not a finished data set"):
        ShardDataset(target)
    assert not prepared_index(target, DESCRIBED)
    write(target)
    assert MARKER_NAME not in names(target)
    assert "shard-00002.safetensors.partial" not in names(target)
    ShardDataset(target).verify()


def test_a_killed_preparation_with_other_settings_is_not_touched(tmp_path):
    target = tmp_path / "data"
    writer = ShardWriter(target, description=DESCRIBED, samples_per_shard=2)
    writer.__enter__()
    del writer
    other = DatasetDescription({"name": "other"}, SHAPE, ("zero",))
    with pytest.raises(OutputError, match="not an unfinished preparation with these settings"):
        write(target, described=other)
    assert names(target) == [MARKER_NAME]


def test_a_preparation_that_goes_on_is_not_taken_for_a_killed_one(tmp_path):
    with ShardWriter(tmp_path / "a", description=DESCRIBED, samples_per_shard=2) as writer:
        for number in range(5):
            writer.add(pixels(number), 0)
        before = names(tmp_path / "a")
        with pytest.raises(OutputError, match=r"another process .* is writing shards into .*a;"):
            write(tmp_path / "a")
        assert names(tmp_path / "a") == before
    assert len(ShardDataset(tmp_path / "a")) == 5


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"not empty \(it holds thesis.tex\)"):
        write(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("below", ["file", "file/deeper/still", "x" * 300])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=rf"cannot write {tmp_path / below}: \w"):
        prepared_index(tmp_path / below, DESCRIBED) or write(tmp_path / below)
    assert names(tmp_path) == ["file"]


def write_with_an_obstacle(folder):
    with ShardWriter(folder, description=DESCRIBED, samples_per_shard=2) as writer:
        # A directory in the shard's place makes writing fail for every user, root included.
        obstacle = folder / "shard-00001.safetensors.partial"
        obstacle.mkdir()
        try:
            for number in range(5):
                writer.add(pixels(number), 0)
        finally:
            obstacle.rmdir()


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*shard-00001\.safetensors: "):
        write_with_an_obstacle(tmp_path / "data")
    assert names(tmp_path) == []


def test_finished_data_sets_are_recognised(folder, tmp_path):
    assert prepared_index(folder, DESCRIBED)
    assert not prepared_index(tmp_path / "none", DESCRIBED)
    other = DatasetDescription({"name": "test", "seed": 2}, (3, 8, 6), DESCRIBED.class_names)
    with pytest.raises(OutputError, match=r"image_shape.1 is 4 there and 8 here"):
        prepared_index(folder, other)
    with pytest.raises(OutputError, match="seed is 1 there and 2 here"):
        prepared_index(folder, other)


def test_shards_are_the_same_bytes_every_time(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_shards_have_the_permissions_of_ordinary_files(folder):
    (folder / "ordinary").write_text("")
    expected = (folder / "ordinary").stat().st_mode
    assert all(path.stat().st_mode == expected for path in folder.iterdir())


def test_a_folder_of_data_sets_names_them(tmp_path, monkeypatch):
    for part in ("train", "heldout"):
        write(tmp_path / "digits" / part)
    with pytest.raises(DataError, match="but heldout/ and train/ in it are data sets; give such"):
        ShardDataset(tmp_path / "digits")
    (tmp_path / "digits" / "heldout" / INDEX_NAME).unlink()
    with pytest.raises(DataError, match="but train/ in it is a data set"):
        ShardDataset(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"none: no such data folder .looked for at {tmp_path}/no"):
        ShardDataset(Path("none"))
