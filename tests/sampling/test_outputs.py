"""The outputs of a set: the same pixels and labels in each, from parts or from each other."""

import json
import os
import resource
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from builders import contents
from kills import killed_at
from PIL import Image
from places import ROOT

from srepa_ds.commands.verify import verify
from srepa_ds.config.sections import SampleConfig
from srepa_ds.data.shards import ShardDataset
from srepa_ds.errors import DataError, OutputError
from srepa_ds.sampling.config import SamplerConfig
from srepa_ds.sampling.generate import ImageBatch, plan_chunks
from srepa_ds.sampling.image_archive import ImageArchive
from srepa_ds.sampling.outputs.content import regrouped
from srepa_ds.sampling.outputs.table import OUTPUTS
from srepa_ds.sampling.provenance import Provenance
from srepa_ds.sampling.writer import ChunkWriter

CHUNKS = plan_chunks(SamplerConfig(num_samples=23, batch_size=5))
FACTS = Provenance({"ema": "0.9999", "seed": 3})
IMAGES = np.random.default_rng(0).integers(0, 256, (23, 6, 4, 3), dtype=np.uint8)
LABELS = np.arange(23) % 4


def drawn(chunk):
    own = slice(chunk.start, chunk.stop)
    images, labels = torch.from_numpy(IMAGES[own]), torch.from_numpy(LABELS[own])
    return ImageBatch(images, labels, chunk.sample_ids(), chunk)


def writer_of(folder, *outputs):
    return ChunkWriter(folder, FACTS, outputs)


def finished(folder, *outputs):
    writer = writer_of(folder, *outputs)
    for chunk in writer.missing(CHUNKS):
        writer.write(drawn(chunk))
    writer.assemble(CHUNKS, num_classes=4)
    return folder


def read_npz(folder):
    archive = ImageArchive(folder / "samples.npz")
    return np.concatenate(list(archive.blocks(5))), archive.labels


def read_png(folder):
    paths = sorted((folder / "png").glob("*.png"))
    assert [path.name for path in paths] == [f"{number:06d}.png" for number in range(23)]
    labels = [int(line) for line in (folder / "png" / "labels.txt").read_text().splitlines()]
    return np.stack([np.asarray(Image.open(path)) for path in paths]), np.array(labels)


def read_shards(folder):
    dataset = ShardDataset(folder / "shards")
    batch = dataset.read(torch.arange(len(dataset)))
    return batch.pixels.permute(0, 2, 3, 1).numpy(), batch.labels.numpy()


# As other programs read them.
READERS = {"npz": read_npz, "png": read_png, "shards": read_shards}


def check(folder, *outputs):
    for name in outputs:
        images, labels = READERS[name](folder)
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, LABELS)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["contact_sheet.png", "provenance.json", *(OUTPUTS[name].name for name in outputs)]
    )


def test_every_output_that_can_be_asked_for_is_in_the_table():
    names = get_args(get_args(SampleConfig.model_fields["outputs"].annotation)[0])
    assert set(names) == set(OUTPUTS) == set(READERS)


def test_all_outputs_hold_the_same(tmp_path):
    check(finished(tmp_path, *OUTPUTS), *OUTPUTS)
    for folder in (tmp_path, tmp_path / "png", tmp_path / "shards"):
        assert json.loads((folder / "provenance.json").read_text()) == FACTS.facts


def test_the_shards_are_a_data_set(tmp_path):
    finished(tmp_path, "shards")
    assert "23 samples" in verify(tmp_path / "shards")
    dataset = ShardDataset(tmp_path / "shards")
    assert dataset.index.version == 2
    assert dataset.index.source == {"kind": "sample", "provenance": FACTS.facts}
    assert dataset.index.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("first", OUTPUTS)
def test_an_output_that_is_added_later_is_made_of_another(tmp_path, first):
    finished(tmp_path, first)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    writer = writer_of(tmp_path, *OUTPUTS)
    assert not writer.is_complete()
    assert not writer.missing(CHUNKS)
    writer.assemble(CHUNKS, num_classes=4)
    check(tmp_path, *OUTPUTS)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_outputs_do_not_depend_on_what_they_are_made_of(tmp_path):
    finished(tmp_path / "at once", *OUTPUTS)
    for number, first in enumerate(OUTPUTS):
        folder = tmp_path / str(number)
        finished(folder, first)
        finished(folder, *OUTPUTS)
        assert contents(folder) == contents(tmp_path / "at once")


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTPUTS)
def test_killed_at_any_moment_the_next_command_completes(tmp_path, name):
    expected = contents(finished(tmp_path / "undisturbed", name))
    step = 7 if name == "png" else 4
    for moment in count(1, step):
        folder = tmp_path / str(moment)
        was_killed = killed_at(moment, lambda folder=folder: finished(folder, name), folder)
        finished(folder, name)
        writer_of(folder, name).tidy_up()
        assert contents(folder) == expected, moment
        if not was_killed:
            return


def test_a_png_that_was_cut_off_is_written_again(tmp_path):
    expected = contents(finished(tmp_path / "undisturbed", "png") / "png")
    writer_of(tmp_path / "set", "png")
    (tmp_path / "set" / "png.partial").mkdir()
    for name, kept in (("000003.png", -1), ("000004.png", 0)):
        (tmp_path / "set" / "png.partial" / name).write_bytes(expected[name][:kept])
    assert contents(finished(tmp_path / "set", "png") / "png") == expected


def with_small_files(action) -> None:
    """Runs `action` where no file can have more than 600 bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    action()


@pytest.mark.parametrize("name", ["npz", "shards"])
def test_a_full_disk_leaves_the_parts_and_no_half_output(tmp_path, name):
    writer = writer_of(tmp_path, name)
    for chunk in CHUNKS:
        writer.write(drawn(chunk))
    (tmp_path / "contact_sheet.png").touch()

    def assemble():
        writer.write_sheet(CHUNKS)
        with pytest.raises(OutputError, match=r"cannot write .*(File too large|No space)"):
            with_small_files(lambda: writer.assemble(CHUNKS, num_classes=4))

    child = os.fork()
    if child == 0:
        try:
            assemble()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not writer.is_complete()
    assert len(writer.parts.present()) == len(CHUNKS)
    assert not [path for path in tmp_path.rglob("*.partial")]
    writer.assemble(CHUNKS, num_classes=4)
    check(tmp_path, name)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        (
            "npz",
            "samples.npz",
            "samples.npz: cannot be read .*; remove it and run the same command",
        ),
        ("png", "png/000007.png", "000007.png: .*; remove the folder `png`"),
        ("png", "png/labels.txt", "holds 12 labels for 23 images; remove"),
        ("shards", "shards/shard-00000.safetensors", "shard-00000.safetensors"),
    ],
)
def test_a_damaged_output_is_named_and_nothing_is_made_of_it(tmp_path, name, file, words):
    finished(tmp_path, name)
    cut(tmp_path / file)
    others = [other for other in OUTPUTS if other != name]
    with pytest.raises(DataError, match=words):
        finished(tmp_path, name, *others)
    assert not [other for other in others if OUTPUTS[other].is_there(tmp_path)]
    assert OUTPUTS[name].is_there(tmp_path)


def test_rows_are_regrouped():
    blocks = [IMAGES[:5], IMAGES[5:5], IMAGES[5:6], IMAGES[6:20], IMAGES[20:]]
    for rows in (1, 4, 23, 100):
        groups = list(regrouped(iter(blocks), rows))
        assert [len(group) for group in groups[:-1]] == [rows] * (22 // rows)
        np.testing.assert_array_equal(np.concatenate(groups), IMAGES)
    assert not list(regrouped(iter([]), 3))


@pytest.mark.slow
def test_a_set_is_assembled_in_little_memory(tmp_path):
    """Of 126 MB, a block at a time: it grew by 114 to 124 MB."""
    command = [sys.executable, ROOT / "tests/workers/assembly_memory.py", tmp_path / "set"]
    done = subprocess.run(
        [*command, "npz", "shards"], capture_output=True, text=True, check=True, timeout=100
    )
    assert int(done.stdout) < 200e6
