"""Archives of arrays are read as numpy reads them, and never beyond what they announce."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from srepa_ds.documents.npz_reader import NpzArchive


def archive(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


def member(array, **header):
    """Returns the bytes of an array's member, with some of its header replaced."""
    file = io.BytesIO()
    own = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, {**own, **header})
    return file.getvalue() + array.tobytes()


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, contents in members:
            file.writestr(name, contents)
    return path


ARRAYS = {
    "arr_0": np.arange(7 * 3 * 2, dtype=np.uint8).reshape(7, 3, 2),
    "mu": np.linspace(0, 1, 5),
    "count": np.array(3),
    "none": np.zeros((0, 4), dtype=np.float32),
    "swapped": np.arange(3, dtype=">i4"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(tmp_path, save):
    with NpzArchive(archive(tmp_path / "a.npz", save, **ARRAYS)) as found:
        assert set(found.arrays) == set(ARRAYS)
        for name, expected in ARRAYS.items():
            array = found.read(name)
            assert found.arrays[name].shape == array.shape == expected.shape
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_blocks_are_the_array_in_pieces(tmp_path, rows):
    with NpzArchive(archive(tmp_path / "a.npz", np.savez_compressed, **ARRAYS)) as found:
        blocks = list(found.blocks("arr_0", rows))
    assert [len(block) for block in blocks[:-1]] == [rows] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks), ARRAYS["arr_0"])
    blocks[0][:] = 0  # They can be written to.


def test_other_members_are_left_alone(tmp_path):
    contents = [("note.txt", b"hello"), ("arr_0.npy", member(ARRAYS["arr_0"]))]
    with NpzArchive(zipped(tmp_path / "a.npz", contents)) as found:
        assert set(found.arrays) == {"arr_0"}


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


OBJECTS = np.array([Bomb()], dtype=object)
ZEROS = np.zeros(100 << 20, dtype=np.uint8)
HOSTILE = {
    "objects": ([("a.npy", member(np.zeros(1), descr="|O"))], "holds Python objects"),
    "a pickle": ([("a.npy", pickle.dumps(OBJECTS))], "is not an array"),
    "text": ([("a.npy", b"hello")], "is not an array"),
    "more than announced": ([("a.npy", member(np.zeros(5), shape=(4,)))], "does not fit"),
    "less than announced": ([("a.npy", member(np.zeros(5), shape=(1 << 40,)))], "does not fit"),
    "a negative size": ([("a.npy", member(np.zeros(4), shape=(-2, -2)))], "negative size"),
    "columns": ([("a.npy", member(np.zeros((2, 2)), fortran_order=True))], "stored by columns"),
    "code in the header": (
        [("a.npy", member(np.zeros(1)).replace(b"'shape': (1,)", b"'shape': f()  "))],
        "is not an array",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_refused_before_they_are_read(tmp_path, case):
    members, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message):
        NpzArchive(zipped(tmp_path / "a.npz", members))


def test_two_members_of_one_name_are_refused(tmp_path):
    members = [("a.npy", member(np.zeros(1)))] * 2
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "a.npz", members)
    with pytest.raises(ValueError, match="two members of one name"):
        NpzArchive(path)


def test_a_bomb_is_refused_by_its_size_alone(tmp_path):
    path = zipped(tmp_path / "a.npz", [("a.npy", member(ZEROS))], zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="would take 100 MiB when unpacked"):
        NpzArchive(path)


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path):
    whole = archive(tmp_path / "a.npz", **ARRAYS).read_bytes()
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"not an \.npz archive, or is truncated"):
            NpzArchive(tmp_path / "cut.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_is_found(tmp_path, compression):
    noise = np.random.default_rng(0).integers(0, 255, 10_000, dtype=np.uint8)
    path = zipped(tmp_path / "a.npz", [("a.npy", member(noise))], compression)
    contents = bytearray(path.read_bytes())
    contents[5_000] ^= 4
    path.write_bytes(contents)
    with NpzArchive(path) as found, pytest.raises(ValueError, match="a is damaged"):
        found.read("a")


def test_the_checksum_covers_what_was_read_in_blocks(tmp_path):
    path = zipped(tmp_path / "a.npz", [("a.npy", member(np.arange(10_000)))])
    contents = bytearray(path.read_bytes())
    contents[40_000] ^= 1
    path.write_bytes(contents)
    with NpzArchive(path) as found:
        blocks = found.blocks("a", 7)
        next(blocks)
        with pytest.raises(ValueError, match="damaged"):
            list(blocks)


def test_what_is_not_there_is_a_key_error(tmp_path):
    with NpzArchive(archive(tmp_path / "a.npz", **ARRAYS)) as found:
        with pytest.raises(KeyError):
            found.read("arr_9")
        with pytest.raises(ValueError, match="single number"):
            list(found.blocks("count", 2))


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"not an \.npz archive"):
        NpzArchive(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError):
        NpzArchive(tmp_path / "gone.npz")
