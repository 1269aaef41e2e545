import json
import re

import pytest
import small_trees
from small_trees import IMAGES, keys_of, tar_of

from srepa_ds.data.sources.web_dataset import WebDataset
from srepa_ds.errors import DataError

PHOTO = next(iter(IMAGES.values()))


def opened(folder, files, **options):
    folder.mkdir(exist_ok=True)
    (folder / "train.tar").write_bytes(tar_of(files))
    return WebDataset(folder, **options)


def test_samples_are_files_of_one_name(tmp_path):
    source = opened(tmp_path / "w", {
        "a/000.jpg": PHOTO, "b/000.jpg": PHOTO[:-1], "a/000.cls": b"3", "b/000.cls": b" 1\n",
        "a/000.seg.png": b"-", "a/000.txt": b"a caption", "._a/000.jpg": b"-", "a/._000.jpg": b"-",
        "only text.txt": b"-",
    })  # fmt: skip
    assert keys_of(source) == ["train.tar/a/000.jpg", "train.tar/b/000.jpg"]
    assert source.labels.tolist() == [3, 1]
    assert source.class_names == ("0", "1", "2", "3")
    assert [source.item(index).image for index in (0, 1)] == [PHOTO, PHOTO[:-1]]


def test_tars_in_the_order_given(tmp_path):
    folder = small_trees.write_web_dataset(tmp_path / "w")
    paths = (folder / "train-001.tar", folder / "train-000.tar")
    source = WebDataset(paths)
    assert keys_of(source)[0].startswith("train-001.tar/")
    assert sorted(keys_of(source)) == keys_of(WebDataset(folder))
    assert len(WebDataset(paths[0]).labels) == 10
    with pytest.raises(DataError, match=r"names train-001\.tar more than once"):
        WebDataset((paths[0], paths[0]))
    with pytest.raises(DataError, match="names no tar"):
        WebDataset(())


LABELS = {
    "none": ({}, None, "has no .cls; write one whole number into NAME.cls"),
    "in a pickle alone": ({"pkl": b"."}, None, "has no .cls; a.pkl could run code and is not read"),
    "in weights alone": ({"pth": b"."}, None, "a.pth"),
    "in another field": ({"json": b"{}"}, None, "name the field of .json with the label"),
    "a word": ({"cls": b"cat"}, None, "'a.cls' holds no label ('cat' is not a whole number)"),
    "below zero": ({"cls": b"-1"}, None, "'-1' is not a whole number"),
    "not text": ({"cls": b"\xff\xfe"}, None, "'a.cls' holds no label"),
    "huge": ({"cls": b"1" * (2 << 20)}, None, "too many for a label"),
    "too great": ({"cls": b"99999999"}, None, "the label 99999999 is not from 0 to 999,999"),
    "no JSON": ({"json": b"{"}, "label", "'a.json' holds no label"),
    "deep JSON": ({"json": b"[" * 5000}, "label", "nested too deeply"),
    "no field": ({"json": b'{"x": 1}'}, "label", "its 'label' is 'None'"),
    "a list": ({"json": b'{"label": [1]}'}, "label", "not a whole number or a name"),
    "true": ({"json": b'{"label": true}'}, "label", "its 'label' is 'True'"),
    "no .json": ({"cls": b"1"}, "label", "has no .json"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_that_cannot_be(name, tmp_path):
    files, label_field, words = LABELS[name]
    named = {f"a.{ending}": contents for ending, contents in files.items()}
    with pytest.raises(DataError, match=re.escape(words)):
        opened(tmp_path / "w", {"a.jpg": PHOTO, **named}, label_field=label_field)


def test_names_and_numbers_do_not_mix(tmp_path):
    labels = ["cat", "ant", "cat"]
    files = {f"{n}.json": json.dumps({"label": label}).encode() for n, label in enumerate(labels)}
    images = {f"{n}.jpg": PHOTO for n in range(3)}
    source = opened(tmp_path / "w", {**images, **files}, label_field="label")
    assert (source.labels.tolist(), source.class_ids) == ([1, 0, 1], ("ant", "cat"))
    files["0.json"] = b'{"label": 0}'
    with pytest.raises(DataError, match="some labels are numbers and others names"):
        opened(tmp_path / "w", {**images, **files}, label_field="label")


def test_other_folders_and_tars_are_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere: No such file"):
        WebDataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        WebDataset(tmp_path)
    with pytest.raises(DataError, match="holds no samples with an image"):
        opened(tmp_path / "w", {"a.txt": b"-"})
    with pytest.raises(DataError, match=r"the sample 'a' has several images \(a\.jpg, a\.png\)"):
        opened(tmp_path / "w", {"a.jpg": PHOTO, "a.png": PHOTO, "a.cls": b"1"})
    with pytest.raises(DataError, match=r"'\.\./a\.jpg' leads out"):
        opened(tmp_path / "w", {"../a.jpg": PHOTO, "../a.cls": b"1"})
    (tmp_path / "w" / "train.tar").write_bytes(tar_of({"a.jpg": PHOTO}, mode="w:gz"))
    with pytest.raises(DataError, match="gunzip"):
        WebDataset(tmp_path / "w")
