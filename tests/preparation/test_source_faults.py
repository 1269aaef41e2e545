"""A source that has gone is no heap of broken images, and nothing of it is skipped."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from latent_world import write_photographs

from srepa_ds.cli import run
from srepa_ds.data.sources import image_file


@pytest.fixture
def tree(tmp_path) -> Path:
    write_photographs(tmp_path / "images", images_per_class=4)
    return tmp_path / "images"


def config_of(tree: Path, **changes) -> Path:
    settings = {
        "kind": "prepare",
        "source": {"kind": "image_folder", "path": str(tree)},
        "image_size": 16,
        "output": str(tree.parent / "data"),
        "on_error": "skip",
        "samples_per_shard": 3,
        "threads": 1,
        **changes,
    }
    path = tree.parent / "prepare.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_ends_the_preparation(tree, monkeypatch, capfd, number):
    path, seen = config_of(tree), []

    def failing(place, *, root):
        seen.append(place)
        if len(seen) > 5:
            raise image_file.read_failure(OSError(number, os.strerror(number)), root=root)
        return place.read_bytes()

    monkeypatch.setattr("srepa_ds.data.sources.image_folder.image_file", failing)
    assert run(["prepare", str(path)]) == 2
    assert "the source cannot be read any more" in capfd.readouterr().err
    monkeypatch.undo()
    assert run(["prepare", str(path)]) == 0
    index = json.loads((tree.parent / "data/train/index.json").read_text())
    assert (index["num_samples"], index["num_skipped"]) == (12, 0)


def test_a_folder_that_goes_ends_the_preparation(tree, monkeypatch, capfd):
    path, real, seen = config_of(tree), image_file.image_file, []

    def vanishing(place, *, root):
        seen.append(place)
        if len(seen) == 6:
            shutil.rmtree(root)
        return real(place, root=root)

    monkeypatch.setattr("srepa_ds.data.sources.image_folder.image_file", vanishing)
    assert run(["prepare", str(path)]) == 2
    assert "the source cannot be read any more" in capfd.readouterr().err
    assert not (tree.parent / "data/train/index.json").exists()


def test_one_file_that_goes_is_one_broken_image(tree, monkeypatch):
    path, real = config_of(tree), image_file.image_file

    def losing(place, *, root):
        if place.name.endswith("_2.JPEG"):
            place.unlink()
        return real(place, root=root)

    monkeypatch.setattr("srepa_ds.data.sources.image_folder.image_file", losing)
    assert run(["prepare", str(path)]) == 0
    index = json.loads((tree.parent / "data/train/index.json").read_text())
    assert (index["num_samples"], index["num_skipped"]) == (9, 3)


def test_a_link_to_a_name_that_is_not_unicode_is_listed(tree):
    outside = os.fsencode(tree.parent) + b"/outside-\xff.png"
    os.symlink(outside, os.fsencode(tree / "n01440764") + b"/z.png")
    path = config_of(tree)
    assert run(["prepare", str(path)]) == 0
    data = tree.parent / "data/train"
    (line,) = (data / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "n01440764/z.png"
    assert json.loads((data / "index.json").read_text())["num_samples"] == 12


def test_a_file_larger_than_any_image_is_not_read(tree):
    with (tree / "n01440764" / "huge.png").open("wb") as file:
        file.truncate(1 << 36)
    assert run(["prepare", str(config_of(tree))]) == 0
    (line,) = (tree.parent / "data/train/skipped.jsonl").read_text().splitlines()
    assert "68,719,476,736 bytes, more than any image" in json.loads(line)["reason"]


def test_an_image_that_is_not_skipped_says_how_to_go_on(tree, capfd):
    (tree / "n01440764" / "a.png").write_bytes(b"no image")
    assert run(["prepare", str(config_of(tree, on_error="fail"))]) == 2
    said = capfd.readouterr().err
    assert "n01440764/a.png: cannot be decoded" in said
    assert "set on_error=skip to leave such images out; finished shards stay" in said
