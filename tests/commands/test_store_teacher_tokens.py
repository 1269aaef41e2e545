"""`srepa-ds prepare --teacher` as users run it: what it writes, resumes and refuses."""

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from builders import SmallWorld, contents
from ranks import run_function, start_function
from safetensors.torch import load_file, save_file

from srepa_ds.cli import run
from srepa_ds.commands.store_teacher_tokens import store_tokens
from srepa_ds.config.experiment import load_config
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.shard_index import INDEX_NAME, DatasetDescription
from srepa_ds.data.shard_writer import ShardWriter
from srepa_ds.data.shards import ShardDataset
from srepa_ds.data.token_index import token_file_name
from srepa_ds.data.token_store import TokenStore
from srepa_ds.distributed import ranks
from srepa_ds.encoders.teacher import load_teacher
from srepa_ds.errors import ConfigError, DataError, OutputError

INT8 = "alignments.0.stored_tokens=int8"
FILES = [INDEX_NAME, *(token_file_name(number) for number in range(3))]


@pytest.fixture
def world(small_world, tmp_path) -> SmallWorld:
    """The small world with its own copy of the shards, so that tests share no stores."""
    return small_world.copied_to(tmp_path / "world")


@pytest.fixture(autouse=True)
def _alone():
    yield
    ranks.close()


def store(world, *overrides, batch_size=16):
    return store_tokens(load_config(world.config, overrides), batch_size=batch_size)


class SignalAt(logging.Handler):
    """Sends this process a signal as soon as words are logged."""

    def __init__(self, words: str, number: int):
        super().__init__()
        self._words, self._number = words, number

    def emit(self, record: logging.LogRecord) -> None:
        if self._words in record.getMessage():
            os.kill(os.getpid(), self._number)


def store_on_ranks(config: str, words: str = "", number: int = 0) -> None:
    """Stores int8 tokens on this rank, which gets a signal once `words` are logged."""
    if words:
        log = logging.getLogger("srepa_ds")
        log.addHandler(SignalAt(words, number))
        log.setLevel(logging.INFO)
    store_tokens(load_config(Path(config), [INT8]), batch_size=16)


def teachers_of(world) -> list[str]:
    return sorted(path.name for path in (world.folder / "shards").glob("teachers/*"))


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_stored_tokens_are_the_teacher_s(world, storage):
    (folder,) = store(world, f"alignments.0.stored_tokens={storage}")
    assert folder.parent == world.folder / "shards" / "teachers"
    assert folder.name.startswith(f"vit_tiny_patch16_224-{storage}-")
    config = load_config(world.config)
    dataset = ShardDataset(config.data.folder, [TokenStore(folder)])
    teacher = load_teacher(config.alignments[0].teacher, resolution=16, device="cpu")
    batch = dataset.read(torch.tensor([89, 0, 39, 40, 79, 80, 41, 15, 16]))
    (stored,) = batch.teacher_tokens
    live = teacher.tokens(batch.pixels)
    # The batch differs, and with it the order of summation in the teacher.
    slack = 1e-5 * live.patches.abs().max()
    error = (stored.patches_float32() - live.patches).abs()
    step = live.patches.abs() * 2**-8 if storage == "bf16" else stored.patches_scale[..., None] / 2
    assert bool((error <= step + slack).all())
    torch.testing.assert_close(stored.cls, live.cls, rtol=1e-5, atol=1e-5)
    dataset_index = TokenStore(folder).index
    assert (dataset_index.grid, dataset_index.width, dataset_index.has_cls) == ((8, 8), 32, True)


def test_size_and_folder_are_announced_before_the_first_batch(world, caplog):
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        (folder,) = store(world, INT8)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == (
        f"{folder}: 90 images x 64 tokens x 32 channels x 1 byte, 0.00022 GB in all; "
        "writing 0.00022 GB"
    )
    size = sum((folder / name).stat().st_size for name in FILES[1:])
    assert f"{size / 1e9:.2g}" == "0.00022"
    assert messages[1].startswith("batch 1/7")


def test_a_finished_store_is_left_alone(world, caplog):
    (folder,) = store(world, INT8)
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    with caplog.at_level(logging.INFO, logger="srepa_ds"):
        assert store(world, INT8) == (folder,)
    assert "already there, nothing to do" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}


def test_each_teacher_and_storage_has_a_folder_and_none_is_written_twice(world):
    tree = yaml.safe_load(world.config.read_text())
    (alignment,) = tree["alignments"]
    other = {**alignment["teacher"], "dtype": "bf16"}
    tree["alignments"] = [
        {**alignment, "stored_tokens": "int8"},
        {**alignment, "stored_tokens": None},
        {**alignment, "stored_tokens": "int8", "depth": 1},
        {**alignment, "stored_tokens": "bf16"},
        {**alignment, "stored_tokens": "int8", "teacher": other},
    ]
    world.config.write_text(yaml.safe_dump(tree))
    folders = store(world)
    assert sorted(folder.name for folder in folders) == teachers_of(world)
    assert [folder.name.split("-")[1] for folder in folders] == ["int8", "bf16", "int8"]
    hashes = [folder.name.split("-")[2] for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes(world):
    (folder,) = store(world, INT8)
    expected = contents(folder)
    assert sorted(expected) == FILES
    shutil.rmtree(folder)
    run_function(store_on_ranks, 2, world.config)
    assert contents(folder) == expected


def test_a_killed_run_is_resumed_where_it_stopped(world, tmp_path):
    (folder,) = store(world, INT8)
    expected = contents(folder)
    shutil.rmtree(folder)
    # Of 3 + 3 + 1 batches, the fourth is in the middle of the second shard.
    # As an out-of-memory killer would end it.
    killed = (world.config, "batch 4/7", signal.SIGKILL)
    (process,) = start_function(store_on_ranks, 1, *killed, results=tmp_path)
    output = process.output(seconds=120)
    assert process.returncode == -signal.SIGKILL, output
    assert sorted(path.name for path in folder.iterdir()) == [FILES[1], f"{FILES[2]}.partial"]
    first_written = (folder / FILES[1]).stat().st_mtime_ns
    assert store(world, INT8) == (folder,)
    assert contents(folder) == expected
    assert (folder / FILES[1]).stat().st_mtime_ns == first_written


def test_two_processes_do_not_write_the_same_store(world, tmp_path):
    (folder,) = store(world, INT8)
    expected = contents(folder)
    shutil.rmtree(folder)
    stopped = (world.config, "batch 4/7", signal.SIGSTOP)
    (process,) = start_function(store_on_ranks, 1, *stopped, results=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (folder / f"{FILES[2]}.partial").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(OutputError, match=r"another process .* is storing tokens in .*; wait"):
            store(world, INT8)
        # Another teacher's store is not blocked.
        store(world, "alignments.0.stored_tokens=bf16")
    finally:
        process.send_signal(signal.SIGCONT)
        output = process.output(seconds=120)
    assert process.returncode == 0, output
    assert contents(folder) == expected


def exchange_pictures(folder: Path, *, shards: slice) -> None:
    """Prepares other pictures with the same settings, and exchanges some of the shards."""
    index = json.loads((folder / INDEX_NAME).read_text())
    described = DatasetDescription(
        source=index["source"],
        image_shape=tuple(index["image_shape"]),
        class_names=tuple(index["class_names"]),
    )
    other = folder.with_name("other")
    with ShardWriter(other, description=described, samples_per_shard=40) as writer:
        for number in range(index["num_samples"]):
            writer.add(np.full((16, 16, 3), number, dtype=np.uint8), number % 10)
    fresh = json.loads((other / INDEX_NAME).read_text())
    assert fresh["dataset_id"] == index["dataset_id"]
    for entry in fresh["shards"][shards]:
        (other / entry["file"]).replace(folder / entry["file"])
    index["shards"][shards] = fresh["shards"][shards]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    # The exchange leaves a valid data set, so a refusal is not due to the images.
    ShardDataset(folder).verify()


def test_an_interrupted_store_is_not_mixed_with_tokens_of_other_pictures(world):
    (folder,) = store(world, INT8)
    (folder / INDEX_NAME).unlink()
    (folder / FILES[3]).unlink()
    before = contents(folder)
    exchange_pictures(world.folder / "shards", shards=slice(1, 3))
    words = r"tokens-00001\.safetensors: tokens of other images.*in shard-00001.* now; delete"
    with pytest.raises(DataError, match=words):
        store(world, INT8)
    assert contents(folder) == before
    (folder / FILES[2]).unlink()
    assert store(world, INT8) == (folder,)
    TokenStore(folder).check_fits(ShardDataset(world.folder / "shards").index, world.folder)


def test_a_finished_store_is_refused_beside_other_pictures(world):
    store(world, INT8)
    exchange_pictures(world.folder / "shards", shards=slice(2, 3))
    with pytest.raises(DataError, match=r"tokens-00002\.safetensors: tokens of 10 images that are"):
        store(world, INT8)


def test_tokens_of_damaged_images_are_not_stored(world):
    path = world.folder / "shards" / shard_name(2)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=rf"{shard_name(2)}: contents changed since it was written"):
        store(world, INT8)
    (folder,) = (world.folder / "shards" / "teachers").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == FILES[1:3]


def test_a_damaged_store_is_not_taken_for_finished(world):
    (folder,) = store(world, INT8)
    (folder / FILES[2]).unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.safetensors: missing, .*delete"):
        store(world, INT8)


def weights_with(world, small_world, *, bias: float, name: str = "other.safetensors") -> str:
    """Returns an override naming weights whose last layer adds `bias` to every token."""
    tensors = load_file(small_world.folder / "teacher.safetensors")
    tensors["norm.bias"] = tensors["norm.bias"] + bias
    save_file(tensors, world.folder / name)
    return f"alignments.0.teacher.weights={world.folder / name}"


def test_other_weights_get_another_folder(world, small_world):
    first = store(world, INT8)
    second = store(world, INT8, weights_with(world, small_world, bias=1.0))
    assert first != second
    assert len(teachers_of(world)) == 2
    # A copy of the same weights is the same teacher.
    shutil.copy(small_world.folder / "teacher.safetensors", world.folder / "copy.safetensors")
    weights = f"alignments.0.teacher.weights={world.folder / 'copy.safetensors'}"
    assert store(world, INT8, weights) == first


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_tokens_that_are_not_finite_name_their_samples_and_leave_nothing(
    world, small_world, storage
):
    overrides = [
        f"alignments.0.stored_tokens={storage}",
        weights_with(world, small_world, bias=float("nan")),
    ]
    with pytest.raises(DataError, match="sample 0, 1, 2, 3, 4 and 11 more are not finite"):
        store(world, *overrides)
    assert not (world.folder / "shards" / "teachers").exists()


def test_too_little_disk_is_refused_before_anything_is_written(world, monkeypatch):
    usage = shutil.disk_usage(world.folder)._replace(free=200_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    free = r"GB and 0\.0002 GB are free; make room, "
    with pytest.raises(OutputError, match=rf"need 0\.00022 {free}or set stored_tokens=null"):
        store(world, INT8)
    with pytest.raises(OutputError, match=rf"need 0\.00038 {free}set stored_tokens=int8 inst"):
        store(world, "alignments.0.stored_tokens=bf16")
    assert not (world.folder / "shards" / "teachers").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=230_000))
    store(world, INT8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("alignments.0.stored_tokens=null", "set alignments.0.stored_tokens=bf16"),
        ("alignments=[]", "is empty, so there is no teacher"),
    ],
)
def test_nothing_to_store_is_an_error_that_says_what_to_set(world, override, words):
    with pytest.raises(ConfigError, match=words):
        store(world, override)


def test_a_folder_that_cannot_be_written_to_is_named(world):
    (world.folder / "shards" / "teachers").write_text("a file, where a folder is wanted")
    with pytest.raises(OutputError, match=r"cannot write .*teachers/vit_tiny.*; make room"):
        store(world, INT8)


def test_the_command_line_stores_and_says_what_is_missing(world, capfd):
    command = ["prepare", str(world.config), "--teacher"]
    assert run([*command, INT8]) == 0
    assert "90 images x 64 tokens" in capfd.readouterr().err
    assert len(teachers_of(world)) == 1
    for arguments, words in (
        (command, "nothing to store"),
        ([*command, INT8, "alignments.0.teacher.weights=none.pt"], "weights none.pt: No such file"),
        (["prepare", str(world.config)], "this file is of kind 'experiment', not 'prepare'"),
    ):
        assert run(arguments) == 2
        assert words in capfd.readouterr().err
        assert not ranks.joined()
