"""`srepa-ds verify`: every kind of folder is recognised, and all faults are listed."""

import json
import shutil

import pytest
import torch
from builders import contents
from places import GOLDEN
from small_data import prepare, store
from torch import nn

from srepa_ds.cli import run
from srepa_ds.commands.verify import verify
from srepa_ds.data.index_document import INDEX_NAME
from srepa_ds.data.shard_file import shard_name
from srepa_ds.data.token_index import token_file_name
from srepa_ds.encoders import teacher_folder
from srepa_ds.errors import DataError

FORMAT_1 = GOLDEN / "format-1"

SUMMARY = """9 files, 0.00 MB: all as written
heldout: 3 samples, images stored as raw (2 x 2 px)
  3 decoded, some of each of 2 shards
  2 classes of 1 to 2 samples, median 1.5
train: 3 samples, images stored as raw (2 x 2 px)
  3 decoded, some of each of 2 shards
  2 classes of 1 to 2 samples, median 1.5
"""


def flip(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture
def data(tmp_path):
    """A folder with two parts; a store of tokens lies beside the shards of the first."""
    for part in ("train", "heldout"):
        prepare(tmp_path / "data" / part)
    store(tmp_path / "data" / "train", tmp_path / "data" / "train" / "teachers" / "test")
    return tmp_path / "data"


@pytest.fixture
def teacher(tmp_path):
    folder = tmp_path / "teacher"
    with teacher_folder.claimed(folder):
        teacher_folder.save(folder, nn.Linear(2, 2), {"heldout_accuracy": 0.5, "identity": {}})
    return folder


@pytest.fixture
def trained(tmp_path):
    """A run with two checkpoints and an exported model."""
    folder = shutil.copytree(FORMAT_1 / "run", tmp_path / "run")
    shutil.copytree(folder / "checkpoints/step-0000004", folder / "checkpoints/step-0000002")
    shutil.copytree(FORMAT_1 / "export", folder / "export")
    return folder


def faults_of(folder):
    before = contents(folder)
    with pytest.raises(DataError) as caught:
        verify(folder)
    assert contents(folder) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "count"),
    [("", 9), ("train", 6), ("heldout", 3), ("train/teachers/test", 3), ("train/teachers", 3)],
)
def test_whole_data_is_said_to_be_so(data, place, count):
    assert verify(data / place).split("\n")[0] == f"{count} files, 0.00 MB: all as written"


def test_whole_runs_models_and_teachers_are_said_to_be_so(trained, teacher):
    assert verify(trained).startswith("10 files, ")
    assert verify(trained / "checkpoints").startswith("8 files, ")
    assert verify(trained / "checkpoints" / "step-0000002").startswith("4 files, ")
    assert verify(trained / "export").startswith("2 files, ")
    assert verify(teacher).startswith("2 files, ")


def test_all_faults_of_data_are_listed(data):
    flip(data / "train" / shard_name(0))
    (data / "train" / shard_name(1)).unlink()
    flip(data / "train" / "teachers" / "test" / token_file_name(1))
    (data / "heldout" / INDEX_NAME).write_text("{")
    text = faults_of(data)
    assert text.startswith(f"{data}: 4 faults in 7 files\n")
    assert f"train/{shard_name(0)}: contents changed since it was written" in text
    assert f"train/{shard_name(1)}: missing, but the index names it" in text
    assert f"test/{token_file_name(1)}: contents changed since it was written" in text
    assert f"heldout/{INDEX_NAME}: not readable as JSON" in text


def test_tokens_of_other_images_are_a_fault(data):
    index = data / "train" / INDEX_NAME
    tree = json.loads(index.read_text())
    tree["shards"] = tree["shards"][:1]
    tree["num_samples"] = 2
    index.write_text(json.dumps(tree))
    assert "teachers/test: tokens of 2 shards, but" in faults_of(data)


def test_a_label_without_class_is_a_fault(data):
    index = data / "train" / INDEX_NAME
    tree = json.loads(index.read_text())
    tree |= {"num_classes": 1, "class_names": ["zero"]}
    index.write_text(json.dumps(tree))
    assert f"{shard_name(0)}: labels run from 0 to 1, expected 0 to 0" in faults_of(data)


def test_what_is_not_finished_is_a_fault(data):
    (data / "heldout" / INDEX_NAME).unlink()
    assert "this is not a finished data set" in faults_of(data / "heldout")
    (data / "train" / "teachers" / "test" / INDEX_NAME).unlink()
    assert "these tokens are not finished" in faults_of(data / "train" / "teachers" / "test")


def test_all_faults_of_a_run_are_listed(trained):
    flip(trained / "checkpoints/step-0000002/fragments-00001.safetensors")
    (trained / "checkpoints/step-0000004/state.json").unlink()
    (trained / "export/model.safetensors").write_bytes(b"")
    text = faults_of(trained)
    assert ": 3 faults in 9 files\n" in text
    assert "step-0000002: fragments-00001.safetensors does not match its checksum" in text
    assert "step-0000004: state.json is missing" in text
    assert "does not hold an exported model" in text


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".."])
def test_a_manifest_names_files_of_its_own_folder(trained, name):
    path = trained / "checkpoints/step-0000004/manifest.json"
    tree = json.loads(path.read_text())
    tree["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(tree))
    assert f"its manifest names '{name}', which is not a file in it" in faults_of(trained)


@pytest.mark.parametrize("name", ["model.safetensors", "teacher.json"])
def test_a_teacher_that_changed_is_a_fault(teacher, name):
    path = teacher / name
    if name == "teacher.json":
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    else:
        flip(path)
    text = faults_of(teacher)
    assert "model.safetensors: contents changed since it was written" in text
    assert "train the teacher again with `srepa-ds teacher" in text


def test_a_teacher_that_cannot_be_compared_is_a_fault(teacher):
    (teacher / "model.safetensors").unlink()
    assert "cannot be compared" in faults_of(teacher)


def test_the_command_prints_what_it_found_or_one_message(data, capsys):
    assert run(["verify", str(data)]) == 0
    assert capsys.readouterr().out == SUMMARY
    flip(data / "train" / shard_name(0))
    assert run(["verify", str(data)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1


@pytest.mark.parametrize("make", ["nothing", "empty", "file", "foreign"])
def test_anything_else_is_refused(tmp_path, make):
    place = tmp_path / "place"
    if make == "file":
        place.write_text("")
    elif make != "nothing":
        place.mkdir()
        if make == "foreign":
            torch.save({}, place / "weights.pt")
    with pytest.raises(DataError, match=rf"{place}: .*; give (a|the) folder"):
        verify(place)
