"""Archives of images: as written, or named as what they are."""

import io
import zipfile

import numpy as np
import pytest
from generated import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from srepa_ds.errors import DataError
from srepa_ds.sampling.image_archive import ImageArchive

IMAGES = np.arange(5 * 4 * 2 * 3, dtype=np.uint8).reshape(5, 4, 2, 3)
LABELS = np.array([3, 0, 1, 1, 2])


def read(path):
    """Returns all images and labels."""
    archive = ImageArchive(path)
    return np.concatenate(list(archive.blocks(2))), archive.labels


def test_images_and_labels_are_as_written(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES, LABELS.astype(np.int32))
    images, labels = read(tmp_path / "samples.npz")
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert labels.dtype == np.int64


def test_a_set_of_others_may_have_no_labels(tmp_path):
    np.savez_compressed(tmp_path / "samples.npz", IMAGES)
    images, labels = read(tmp_path / "samples.npz")
    np.testing.assert_array_equal(images, IMAGES)
    assert labels is None


@pytest.mark.parametrize("labels", [LABELS.astype(float), np.eye(5, dtype=np.int64), np.array(3)])
def test_what_is_no_list_of_labels_is_ignored(tmp_path, caplog, labels):
    np.savez(tmp_path / "samples.npz", IMAGES, labels)
    with caplog.at_level("INFO", "srepa_ds"):
        images, found = read(tmp_path / "samples.npz")
    np.testing.assert_array_equal(images, IMAGES)
    assert found is None
    assert "samples.npz: arr_1 is " in caplog.text
    assert "the images count as unlabelled" in caplog.text


def flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 40]) + (
        content[middle + 40 :]
    )  # fmt: skip


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"",
        lambda content: b"PK",
        lambda content: b"somebody's text",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-30],
        flipped,
    ],
)
def test_damage_is_named(tmp_path, save, damaged):
    path = tmp_path / "samples.npz"
    save(path, IMAGES, LABELS)
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(
        DataError, match=r"samples\.npz: cannot be read as images .*as ADM's evaluator reads it"
    ):
        read(tmp_path / "samples.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((IMAGES[:0], LABELS[:0]), "it holds no images"),
        ((IMAGES.astype(np.float32), LABELS), "images are uint8 of shape"),
        ((IMAGES[..., 0], LABELS), "images are uint8 of shape"),
        ((IMAGES.transpose(0, 3, 1, 2), LABELS), "images are uint8 of shape"),
        ((IMAGES, LABELS[:4]), "4 labels for 5 images"),
        ((IMAGES, LABELS - 1), "the label -1 is not from 0 to 999,999"),
        ((IMAGES, LABELS.astype(np.uint64) + 999_997), "the label 1000000 is not from 0 to 999,9"),
        ((IMAGES.astype(object), LABELS), "Python objects"),
    ],
)
def test_another_content_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "samples.npz", *arrays)
    with pytest.raises(DataError, match=f"cannot be read as images .*{message}"):
        read(tmp_path / "samples.npz")


def test_files_that_are_no_archive_of_arrays_are_named(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(DataError, match=r"\(No such file or directory\)"):
        read(tmp_path / "samples.npz")
    with path.open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"not an \.npz archive"):
        read(tmp_path / "samples.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", "text")
    with pytest.raises(DataError, match="is not an array"):
        read(tmp_path / "samples.npz")


def saved(save) -> bytes:
    buffer = io.BytesIO()
    save(buffer, IMAGES, LABELS)
    return buffer.getvalue()


ARCHIVES = {"stored": saved(np.savez), "compressed": saved(np.savez_compressed)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ARCHIVES)
@settings(max_examples=200, deadline=5000)
@given(flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), min_size=1, max_size=4))
def test_no_flipped_bit_gives_any_other_error(tmp_path_factory, form, flips):
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(ARCHIVES[form])
    for position, bits in flips:
        content[position % len(content)] ^= bits
    (folder / "samples.npz").write_bytes(content)
    try:
        read(folder / "samples.npz")
    except DataError:
        pass


def array_file(shape: tuple[int, ...], content: bytes) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


@pytest.mark.parametrize("shape", [(10**9, 4, 2, 3), (2**40, 2**40, 1, 3), (6, 4, 2, 3)])
def test_an_announced_shape_takes_no_memory(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "samples.npz", "w") as archive:
        archive.writestr("arr_0.npy", array_file(shape, IMAGES.tobytes()))
    with pytest.raises(DataError, match="the header of arr_0 does not fit its contents"):
        read(tmp_path / "samples.npz")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    count = 200 << 20
    with zipfile.ZipFile(tmp_path / "samples.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("arr_0.npy", "w") as file:
            file.write(array_file((count, 1, 1, 1), b""))
            for _ in range(count >> 20):
                file.write(bytes(1 << 20))
    with (
        bounded(megabytes=50),
        pytest.raises(DataError, match="arr_0 would take 200 MiB when unpacked"),
    ):
        read(tmp_path / "samples.npz")
