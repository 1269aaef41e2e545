"""The source `parquet`."""

import random
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from foreign_data import picture, png, write_parquet

from srepa_ds.data.decoding import decoded
from srepa_ds.data.sources import parquet_rows
from srepa_ds.data.sources.parquet import ParquetConfig
from srepa_ds.data.sources.source import Source
from srepa_ds.errors import DataError, SourceError

pa = pytest.importorskip("pyarrow")

NAMES = ("tench, Tinca tinca", "goldfish", "shark")


def opened(path, **settings):
    return ParquetConfig(kind="parquet", path=path, **settings).opened()


@pytest.fixture
def folder(tmp_path):
    """Two files of the split `train`, one of `validation`, with 10, 7 and 2 rows."""
    data = tmp_path / "data"
    write_parquet(data / "train-00000-of-00002.parquet", range(10), class_names=NAMES)
    write_parquet(data / "train-00001-of-00002-0123abcd.parquet", range(10, 17), class_names=NAMES)
    write_parquet(data / "validation-00000-of-00001.parquet", range(50, 52), class_names=NAMES)
    return tmp_path


def test_rows_are_samples(folder):
    source = opened(folder, split="train")
    assert isinstance(source, Source)
    assert source.class_names == NAMES
    assert source.labels.tolist() == [number % 3 for number in range(17)]
    for index in (16, 0, 9, 10, 3):
        assert np.array_equal(decoded(source.item(index).image), picture(index))
    assert source.key(9) == "data/train-00000-of-00002.parquet:9"
    assert source.key(10) == "data/train-00001-of-00002-0123abcd.parquet:0"
    assert len({source.key(index) for index in range(17)}) == 17


def test_threads_read_at_random(folder):
    source = opened(folder, split="train")
    order = [random.Random(1).randrange(17) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: source.item(index).image, order))
    assert found == [png(index) for index in order]


def test_a_row_group_is_read_once_and_memory_is_bounded(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "train.parquet", range(40), row_group_size=10)
    source, opened_files = opened(path), []
    monkeypatch.setattr(parquet_rows, "_MOST_BYTES", 20 * len(png(0)))
    once = parquet_rows.opened_file
    monkeypatch.setattr(
        parquet_rows, "opened_file", lambda path: opened_files.append(path) or once(path)
    )
    for index in range(40):
        source.item(index)
    # Once for the places of the row groups, once for each of four.
    assert len(opened_files) == 5
    assert source._groups._num_bytes() <= 20 * len(png(0))
    assert len(source._groups._kept) < 3


def test_labels_are_read_without_images(tmp_path):
    noise = np.random.default_rng(0)
    image = [noise.bytes(1 << 20) for _ in range(24)]
    write_parquet(
        tmp_path / "train.parquet",
        range(24),
        columns=lambda columns: {**columns, "image": pa.array(image)},
    )
    before = pa.total_allocated_bytes()
    peak_before = pa.default_memory_pool().max_memory()
    tracemalloc.start()
    source = opened(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source.labels) == 24
    assert peak < 4 << 20
    assert pa.total_allocated_bytes() - before < 4 << 20
    assert pa.default_memory_pool().max_memory() - peak_before < 4 << 20


def test_other_columns_and_plain_bytes(tmp_path):
    path = write_parquet(
        tmp_path / "x.parquet",
        range(5),
        columns=lambda columns: {
            "jpg": pa.array([png(number) for number in range(5)], pa.large_binary()),
            "cls": pa.array(range(5), pa.uint8()),
        },
    )
    source = opened(path, image_column="jpg", label_column="cls", num_classes=8)
    assert source.item(4).image == png(4)
    assert source.labels.tolist() == list(range(5))
    assert source.class_names == tuple("01234567")
    assert source.key(4) == "x.parquet:4"


@pytest.mark.parametrize(
    ("names", "split", "count"),
    [
        (["train.parquet", "test.parquet"], "test", 1),
        (["default/train/0000.parquet", "default/train/0001.parquet"], None, 2),
        (["0000.parquet", "0001.parquet"], None, 2),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "train", 1),
    ],
)
def test_other_layouts(tmp_path, names, split, count):
    for name in names:
        write_parquet(tmp_path / name, [1])
    assert len(opened(tmp_path, split=split).labels) == count


def test_the_fingerprint_is_of_the_contents_not_of_the_place(folder, tmp_path_factory):
    first = opened(folder, split="train").fingerprint
    elsewhere = folder.rename(tmp_path_factory.mktemp("elsewhere") / "x")
    assert opened(elsewhere, split="train").fingerprint == first
    labels = [0] * 10
    write_parquet(elsewhere / "data/train-00000-of-00002.parquet", range(10), labels=labels,
                  class_names=NAMES)  # fmt: skip
    assert opened(elsewhere, split="train").fingerprint != first


def test_faults_of_a_folder_name_the_files(folder, tmp_path):
    with pytest.raises(DataError, match=r"several splits \(train, validation\); set source.split"):
        opened(folder)
    with pytest.raises(DataError, match="no parquet files of the split 'test'; it has the splits"):
        opened(folder, split="test")
    (folder / "data/train-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="lacks train-00000-of-00002; fetch all files"):
        opened(folder, split="train")
    write_parquet(folder / "data/train-00000-of-00003.parquet", [1])
    with pytest.raises(DataError, match="mixes files of several versions"):
        opened(folder, split="train")
    with pytest.raises(DataError, match="nowhere: No such file"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no parquet"):
        opened(tmp_path / "empty")


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PAR1" + b"\0" * 100, "not a readable parquet file"),
    ],
)
def test_damaged_files_are_named(folder, contents, words):
    (folder / "data/train-00001-of-00002-0123abcd.parquet").write_bytes(contents)
    with pytest.raises(DataError, match=rf"00001-of-00002-0123abcd.parquet: .*{words}"):
        opened(folder, split="train")


def test_a_file_damaged_inside_or_gone_fails_where_it_is_read(folder):
    source, path = opened(folder, split="train"), folder / "data/train-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00002.parquet: .*; fetch the file again"):
        source.item(0)
    path.unlink()
    with pytest.raises(SourceError, match=r"parquet: .*; the source cannot be"):
        source.item(5)


def test_columns_of_other_forms_are_refused(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", range(3))
    with pytest.raises(DataError, match=r"no column 'img', only 'image', 'label'; .*image_column"):
        opened(path, image_column="img")
    with pytest.raises(DataError, match="'label' holds int64, not the bytes of images"):
        opened(path, image_column="label")
    with pytest.raises(DataError, match=r"'image' holds struct<.*>, not integers"):
        opened(path, label_column="image")


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        ([0, None, 1], {}, "1 rows have no label"),
        ([0, -1, 1], {}, "labels run from -1 to 1, expected 0 to 1"),
        ([0, 3, 1], {"num_classes": 3}, "labels run from 0 to 3, expected 0 to 2"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, settings, words):
    path = write_parquet(tmp_path / "x.parquet", range(3), labels=labels)
    with pytest.raises(DataError, match=words):
        opened(path, **settings)


def test_names_and_labels_must_agree(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", range(3), labels=[0, 1, 3], class_names=NAMES)
    with pytest.raises(DataError, match="labels run from 0 to 3, expected 0 to 2"):
        opened(path)
    path = write_parquet(tmp_path / "x.parquet", range(3), class_names=NAMES)
    with pytest.raises(DataError, match=r"names 3 classes itself; remove source.num_classes"):
        opened(path, num_classes=4)


def test_rows_without_an_image_are_refused_one_by_one(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": None, "path": "/home/x/cat.png"}, None, {"bytes": png(2), "path": None}]
    path = write_parquet(
        tmp_path / "x.parquet",
        range(3),
        columns=lambda columns: {**columns, "image": pa.array(images, kind)},
    )
    source = opened(path)
    with pytest.raises(DataError, match=r"only the path '/home/x/cat.png'.* images embedded"):
        source.item(0)
    with pytest.raises(DataError, match="holds no image"):
        source.item(1)
    assert source.item(2).image == png(2)


def test_without_pyarrow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'srepa_ds\[parquet\]'"):
        opened(folder, split="train")


def test_files_of_several_data_sets_are_not_mixed(folder, tmp_path):
    write_parquet(
        tmp_path / "mixed/a/train/0000.parquet",
        range(3),
        labels=[0, 1, 0],
        class_names=("cat", "dog"),
    )
    write_parquet(
        tmp_path / "mixed/b/train/0000.parquet",
        range(3),
        labels=[0, 1, 0],
        class_names=("car", "bus"),
    )
    with pytest.raises(DataError, match="have other classes, so they are not parts of one"):
        opened(tmp_path / "mixed")
