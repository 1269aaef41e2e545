"""Every source of files gives the same keys, labels, names and pixels for the same images."""

import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small_trees
import torch
from small_trees import CLASS_IDS, IMAGES, LABELS, as_pil_reads, keys_of, pixels_of

from srepa_ds.commands.prepare import prepare
from srepa_ds.data.sources.archive import Archive
from srepa_ds.data.sources.file_list import FileList
from srepa_ds.data.sources.image_folder import ImageFolder
from srepa_ds.data.sources.source import Source
from srepa_ds.data.sources.table import SOURCES
from srepa_ds.data.sources.web_dataset import WebDataset
from srepa_ds.preparation.config import PrepareConfig
from srepa_ds.schema import validated

NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus")


def folder(place):
    return ImageFolder(small_trees.write_tree(place / "tree"))


def zipped(place, **options):
    return Archive(small_trees.write_zip(place / "images.zip", **options))


def tarred(place, **options):
    return Archive(small_trees.write_tar(place / "images.tar", **options))


def file_list(place, written):
    return FileList(written, root=small_trees.write_tree(place / "tree"))


MAKERS = {
    "image_folder": folder,
    "zip": zipped,
    "zip, stored, below a folder": lambda place: zipped(
        place, prefix="data/train/", method=zipfile.ZIP_STORED
    ),
    "tar": tarred,
    "tar of ./": lambda place: tarred(place, prefix="./"),
    "tar below a folder": lambda place: tarred(place, prefix="train/"),
    "tar of tars": lambda place: Archive(small_trees.write_tar_of_tars(place / "train.tar")),
    "CSV": lambda place: file_list(place, small_trees.write_csv(place / "list.csv")),
    "CSV without names of columns": lambda place: file_list(
        place, small_trees.write_csv(place / "list.csv", header=False)
    ),
    "JSON lines": lambda place: file_list(place, small_trees.write_json_lines(place / "l.jsonl")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_keys_labels_and_names(name, tmp_path):
    source = MAKERS[name](tmp_path)
    assert isinstance(source, Source)
    assert keys_of(source) == sorted(IMAGES)
    assert source.labels.tolist() == [LABELS[key] for key in sorted(IMAGES)]
    assert source.class_ids == CLASS_IDS
    assert source.class_names[:2] == NAMES
    assert source.class_names[3] == "crane"
    assert source.latents is None


@pytest.mark.parametrize("name", MAKERS)
def test_pixels_from_many_threads(name, tmp_path):
    source = MAKERS[name](tmp_path)
    expected = {key: as_pil_reads(contents) for key, contents in IMAGES.items()}
    order = list(range(len(IMAGES))) * 10
    with ThreadPoolExecutor(8) as pool:
        for index, pixels in zip(
            order, pool.map(lambda i: pixels_of(source, i), order), strict=True
        ):
            assert np.array_equal(pixels, expected[source.key(index)])


@pytest.mark.parametrize("label_field", [None, "class", "wnid"])
def test_web_dataset(label_field, tmp_path):
    source = WebDataset(small_trees.write_web_dataset(tmp_path / "w"), label_field=label_field)
    assert isinstance(source, Source)
    keys = [key.partition("/") for key in keys_of(source)]
    assert [key for _, _, key in keys] == sorted(IMAGES)
    assert [tar for tar, _, _ in keys] == ["train-000.tar"] * 10 + ["train-001.tar"] * 10
    assert source.labels.tolist() == [LABELS[key] for key in sorted(IMAGES)]
    assert source.class_ids == (CLASS_IDS if label_field == "wnid" else ())
    assert source.class_names[0] == (NAMES[0] if label_field == "wnid" else "0")
    for index, key in enumerate(sorted(IMAGES)):
        assert np.array_equal(pixels_of(source, index), as_pil_reads(IMAGES[key]))


def test_numbers_as_labels_of_a_list(tmp_path):
    small_trees.write_tree(tmp_path)
    written = (
        small_trees.write_csv(tmp_path / "a.csv", names=False),
        small_trees.write_json_lines(tmp_path / "a.jsonl", names=False),
    )
    for path in written:
        source = FileList(path)
        assert source.labels.tolist() == [LABELS[key] for key in sorted(IMAGES)]
        assert (source.class_ids, source.class_names) == ((), ("0", "1", "2", "3"))


SECTIONS = {
    "archive": lambda place: {"path": str(small_trees.write_zip(place / "a.zip"))},
    "digits": lambda place: {},
    "file_list": lambda place: {
        "path": str(small_trees.write_csv(place / "l.csv")),
        "root": str(small_trees.write_tree(place / "tree")),
    },
    "image_folder": lambda place: {"path": str(small_trees.write_tree(place / "tree"))},
    "web_dataset": lambda place: {"path": str(small_trees.write_web_dataset(place / "w"))},
}


@pytest.mark.parametrize("kind", sorted(SECTIONS))
def test_prepared_alike(kind, tmp_path):
    assert kind in SOURCES
    source = {"kind": kind, **SECTIONS[kind](tmp_path)}
    tree = {"kind": "prepare", "source": source, "image_size": 16, "output": str(tmp_path / "out")}
    config = validated(PrepareConfig, tree, source="test")
    train = prepare(config)["train"]
    train.verify()
    if kind == "digits":
        return
    other = {**tree, "source": {"kind": "image_folder", "path": str(tmp_path / "other")}}
    small_trees.write_tree(tmp_path / "other")
    other["output"] = str(tmp_path / "other out")
    expected = prepare(validated(PrepareConfig, other, source="test"))["train"]
    everything = torch.arange(len(IMAGES))
    mine, theirs = train.read(everything), expected.read(everything)
    assert torch.equal(mine.pixels, theirs.pixels)
    assert torch.equal(mine.labels, theirs.labels)


def test_a_data_set_does_not_depend_on_where_its_source_lies(tmp_path):
    found = []
    for place in (tmp_path / "a", tmp_path / "b"):
        place.mkdir()
        found.append(
            FileList(
                small_trees.write_csv(place / "list.csv"),
                root=small_trees.write_tree(place / "tree"),
            ).fingerprint
        )
    assert found[0] == found[1]
    assert len({MAKERS[name](tmp_path / "b").fingerprint for name in ("image_folder", "CSV")}) == 1
    contents = tmp_path / "b" / "tree" / sorted(IMAGES)[3]
    contents.write_bytes(contents.read_bytes() + b"\0")
    assert ImageFolder(tmp_path / "b" / "tree").fingerprint != found[0]
