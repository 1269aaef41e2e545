"""The source `repa`."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from foreign_data import picture, write_repa

from srepa_ds.data.decoding import decoded
from srepa_ds.data.sources.repa import RepaConfig
from srepa_ds.data.sources.source import Source
from srepa_ds.errors import DataError


def opened(path, **settings):
    return RepaConfig(kind="repa", path=path, **settings).opened()


@pytest.fixture
def folder(tmp_path):
    """Eight images and their latents, in two folders each."""
    return write_repa(tmp_path / "repa", 8)


def relabelled(folder, change):
    path = folder / "vae-sd" / "dataset.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_samples_are_what_repa_reads(folder):
    source = opened(folder)
    assert isinstance(source, Source)
    # REPA's reader: both listings sorted as text, paired by place, labels by the latent's path.
    images = sorted((folder / "images").rglob("*.png"), key=str)
    arrays = sorted((folder / "vae-sd").rglob("*.npy"), key=str)
    labels = dict(json.loads((folder / "vae-sd/dataset.json").read_text())["labels"])
    assert len(source.labels) == len(images) == len(arrays) == 8
    for index, (image, array) in enumerate(zip(images, arrays, strict=True)):
        item = source.item(index)
        assert item.image == image.read_bytes()
        assert np.array_equal(item.moments.numpy(), np.load(array))
        assert source.key(index) == array.stem[-8:]
        expected = labels[array.relative_to(folder / "vae-sd").as_posix()]
        assert int(source.labels[index]) == expected
    assert np.array_equal(decoded(source.item(7).image), picture(7))
    assert source.class_names == ("0", "1", "2")
    assert source.latents.values == "moments"
    assert source.latents.latent_shape == (4, 4, 4)
    assert source.latents.has_images
    assert not source.latents.mirrored


def test_a_leading_1_is_allowed(folder):
    path = folder / "vae-sd/00000/img-mean-std-00000000.npy"
    array = np.load(path)
    np.save(path, array[None])
    source = opened(folder)
    assert source.latents.latent_shape == (4, 4, 4)
    assert np.array_equal(source.item(0).moments.numpy(), array)
    assert np.array_equal(np.asfortranarray(array), array)
    np.save(path, np.asfortranarray(array))
    assert np.array_equal(opened(folder).item(0).moments.numpy(), array)


def test_without_images_only_latents_are_there(folder):
    shutil.rmtree(folder / "images")
    source = opened(folder)
    assert source.item(3).image is None
    assert source.item(3).moments.shape == (8, 4, 4)
    assert not source.latents.has_images


def test_folders_may_have_other_names(folder):
    (folder / "images").rename(folder / "imagenet_256_vae")
    assert not opened(folder).latents.has_images
    assert opened(folder, images="imagenet_256_vae").latents.has_images


def test_the_fingerprint_is_of_the_contents_not_of_the_place(folder, tmp_path):
    first = opened(folder).fingerprint
    assert opened(folder.rename(tmp_path / "other")).fingerprint == first
    relabelled(tmp_path / "other", lambda tree: tree["labels"][0].__setitem__(1, 2))
    assert opened(tmp_path / "other").fingerprint != first


def test_a_missing_partner_is_named(folder):
    (folder / "images/00000/img00000002.png").unlink()
    words = "without an image: vae-sd/00000/img-mean-std-00000002.npy; complete the folders"
    with pytest.raises(DataError, match=words):
        opened(folder)
    (folder / "vae-sd/00001/img-mean-std-00001001.npy").unlink()
    with pytest.raises(DataError, match=r"without latents: images/00001/img00001001.png; without"):
        opened(folder)


def test_equal_counts_with_other_numbers_are_a_mismatch(folder):
    first = folder / "images/00000/img00000002.png"
    first.rename(first.with_name("img00000007.png"))
    with pytest.raises(DataError, match=r"images/00000/img00000007.png; .*00000002.npy"):
        opened(folder)


def test_pairs_by_place_must_be_pairs_by_number(folder):
    (folder / "images/00009").mkdir()
    (folder / "images/00000/img00000001.png").rename(folder / "images/00009/img00000001.png")
    words = (
        "by their places in sorted order, images/00000/img00000002.png belongs to "
        "vae-sd/00000/img-mean-std-00000001.npy, and by their numbers it does not"
    )
    with pytest.raises(DataError, match=words):
        opened(folder)


@pytest.mark.parametrize("name", ["00000/thumbnail.jpg", "._img00000001.png", "00001/x.npy"])
def test_files_that_would_shift_the_pairs_are_named(folder, name):
    (folder / "images" / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"images: {name} do not belong there, and would shift"):
        opened(folder)


def test_files_that_repa_does_not_count_are_ignored(folder):
    for name in ("README.md", "00000/Thumbs.db", "vae.log"):
        (folder / "images" / name).write_bytes(b"")
    assert len(opened(folder).labels) == 8


def test_two_files_of_one_number_are_refused(folder):
    path = folder / "images/00000/img00000001.png"
    shutil.copy(path, folder / "images/00001" / path.name)
    with pytest.raises(DataError, match="have the same number; keep one"):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(labels=None), "its labels are null, as REPA writes .*; write"),
        (lambda tree: tree.clear(), "has no list of labels"),
        (lambda tree: tree["labels"].pop(3), "no label for 00000/img-mean-std-00000003.npy"),
        (lambda tree: tree["labels"].append(["00009/x.npy", 1]), "labels for 00009/x.npy, which"),
        (lambda tree: tree["labels"].append(["x", 0.5]), r"found \['x', 0.5\]"),
        (lambda tree: tree["labels"].append(["x", True]), r"found \['x', True\]"),
        (lambda tree: tree.update(labels=7), "found 7"),
        (lambda tree: tree["labels"][0].__setitem__(1, -1), "labels run from -1 to 2"),
    ],
)
def test_labels_that_do_not_fit_are_named(folder, change, words):
    relabelled(folder, change)
    with pytest.raises(DataError, match=rf"vae-sd/dataset.json: .*{words}"):
        opened(folder)


def test_labels_beside_the_images_are_not_used(folder):
    (folder / "images/dataset.json").write_text('{"labels": [["00000/img00000000.png", 9]]}')
    assert int(opened(folder).labels[0]) == 0
    (folder / "vae-sd/dataset.json").unlink()
    with pytest.raises(DataError, match=r"vae-sd/dataset.json: No such file .* REPA reads all"):
        opened(folder)


def test_windows_separators_are_read(folder):
    def change(tree):
        tree["labels"] = [[name.replace("/", "\\"), label] for name, label in tree["labels"]]

    before = opened(folder).labels
    relabelled(folder, change)
    assert torch.equal(opened(folder).labels, before)


class Spy:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda good: good.astype(np.float64), "holds float64 of shape"),
        (lambda good: good[:4], r"shape \(4, 4, 4\), expected float32 \(8, 4, 4\)"),
        (lambda good: good[None, None], r"shape \(1, 1, 8, 4, 4\), expected"),
        (lambda good: np.where(good == good.max(), np.nan, good), "not finite"),
        (lambda good: -np.abs(good), "negative standard deviations"),
    ],
)
def test_arrays_of_another_form_are_named(folder, make, words):
    source, path = opened(folder), folder / "vae-sd/00000/img-mean-std-00000003.npy"
    np.save(path, make(np.load(path)))
    with pytest.raises(DataError, match=rf"img-mean-std-00000003.npy: .*{words}"):
        source.item(3)


def test_arrays_cannot_run_code_or_exhaust_memory(folder, tmp_path):
    source, path = opened(folder), folder / "vae-sd/00000/img-mean-std-00000003.npy"
    np.save(path, np.array([Spy(tmp_path / "spied")]), allow_pickle=True)
    with pytest.raises(DataError, match="holds object"):
        source.item(3)
    path.write_bytes(pickle.dumps(Spy(tmp_path / "spied")))
    with pytest.raises(DataError, match=r"img-mean-std-00000003.npy: "):
        source.item(3)
    good = folder / "vae-sd/00000/img-mean-std-00000002.npy"
    path.write_bytes(good.read_bytes().replace(b"(8, 4, 4)", b"(8, 1 << 40)"))
    with pytest.raises(DataError, match=r"img-mean-std-00000003.npy: "):
        source.item(3)
    path.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"img-mean-std-00000003.npy: "):
        source.item(3)
    path.write_bytes(good.read_bytes()[:30])
    with pytest.raises(DataError, match=r"img-mean-std-00000003.npy: "):
        source.item(3)
    path.unlink()
    with pytest.raises(DataError, match=r"img-mean-std-00000003.npy: No such file"):
        source.item(3)
    assert not (tmp_path / "spied").exists()


def test_a_first_array_of_another_form_is_refused_at_once(folder):
    path = folder / "vae-sd/00000/img-mean-std-00000000.npy"
    np.save(path, np.load(path)[0])
    with pytest.raises(DataError, match=r"has the shape \(4, 4\), expected"):
        opened(folder)
    with pytest.raises(DataError, match="nowhere/vae-sd: No such file"):
        opened(folder / "nowhere")
