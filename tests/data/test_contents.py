"""Contents compared with their index in the background: once per file, and damage is named."""

import hashlib
import json
import os
import time

import pytest

from srepa_ds.data import contents
from srepa_ds.data.contents import (
    CHECKED_NAME,
    ContentCheck,
    IndexedFile,
    are_small,
    check_contents,
)
from srepa_ds.errors import DataError


@pytest.fixture
def files(tmp_path):
    found = []
    for number in range(4):
        path = tmp_path / "stores" / f"file-{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * 100)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(IndexedFile(path, 100, sha256, "write it again"))
    return found


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read in full."""
    names, read = [], contents._sha256_of

    def note(path, *go_on):
        names.append(path.name)
        return read(path, *go_on)

    monkeypatch.setattr(contents, "_sha256_of", note)
    return names


def checked(files, folder):
    """Returns a check that has read all it will read."""
    check = ContentCheck(files, remembered_in=folder / CHECKED_NAME)
    check.start()
    check.wait()
    check.close()
    return check


def swap(first, second):
    """Swaps the contents of two files of one size; keeps their times."""
    times = [(path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (first, second)]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    for path, at in zip((first, second), times, strict=True):
        os.utime(path, ns=at)


def test_whole_files_are_read_once(files, tmp_path, hashed):
    check = checked(files, tmp_path)
    assert (check.failure(), check.is_finished()) == (None, True)
    assert hashed == [f"file-{number}" for number in range(4)]
    assert checked(files, tmp_path).is_finished()
    assert len(hashed) == 4


def test_a_damaged_file_is_named(files, tmp_path):
    path = files[2].path
    path.write_bytes(b"x" * 100)
    damage = checked(files, tmp_path).failure()
    assert damage.path == path
    assert f"{path}: contents changed since it was written (sha256 " in damage.message
    assert "write it again" in damage.message
    # Next time as well: what is remembered are sound files.
    assert checked(files, tmp_path).failure() == damage
    with pytest.raises(DataError, match="file-2: contents changed"):
        check_contents(files[2])


def test_two_files_that_were_swapped_are_found(files, tmp_path):
    swap(files[0].path, files[1].path)
    assert checked(files, tmp_path).failure().path == files[0].path


@pytest.mark.parametrize("change", ["time", "size", "inode", "index"])
def test_a_file_that_may_have_changed_is_read_again(files, tmp_path, hashed, change):
    checked(files, tmp_path)
    path = files[1].path
    if change == "time":
        os.utime(path, ns=(0, 0))
    elif change == "size":
        path.write_bytes(b"")
    elif change == "inode":
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.rename(path.with_name("before"))
        path.write_bytes(b"x" * 100)
        os.utime(path, ns=times)
    else:
        files[1] = files[1]._replace(sha256="0" * 64)
    check = checked(files, tmp_path)
    assert hashed[4:] == (["file-1"])
    assert (check.failure() is None) == (change == "time")


def test_without_a_place_to_write_all_files_are_read_each_time(files, tmp_path, hashed):
    nowhere = tmp_path / "nowhere"
    for _ in range(2):
        assert checked(files, nowhere).is_finished()
    assert len(hashed) == 8
    assert not nowhere.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"stores/file-0": 7}', '{"a": ["b", "c"]}', "\xff"])
def test_a_memory_that_is_damaged_is_no_memory(files, tmp_path, hashed, text):
    (tmp_path / CHECKED_NAME).write_text(text, encoding="latin-1")
    assert checked(files, tmp_path).is_finished()
    assert len(hashed) == 4
    assert len(json.loads((tmp_path / CHECKED_NAME).read_text())) >= 4


def test_what_others_remember_is_kept(files, tmp_path, hashed):
    checked(files[:2], tmp_path)
    first = ContentCheck(files[:3], remembered_in=tmp_path / CHECKED_NAME)
    checked(files[3:], tmp_path)
    first.start()
    first.wait()
    first.close()
    assert checked(files, tmp_path).is_finished()
    assert hashed == ["file-0", "file-1", "file-3", "file-2"]


def test_a_removed_file_is_not_damage(files, tmp_path, caplog):
    files[0].path.unlink()
    check = checked(files, tmp_path)
    assert check.failure() is None
    assert "cannot check" in caplog.text
    assert "file-0: No such file" in caplog.text
    assert not check.is_finished()


def test_closing_ends_a_long_file_in_the_middle_and_says_so(tmp_path, monkeypatch, caplog):
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(40 << 30)
    caplog.set_level("INFO", logger="srepa_ds")
    check = ContentCheck(
        [IndexedFile(path, 40 << 30, "0", "")], remembered_in=tmp_path / CHECKED_NAME
    )
    check.start()
    time.sleep(0.05)
    began = time.monotonic()
    check.close()
    assert time.monotonic() - began < 2
    assert "compared the contents of 0 of 1 data files" in caplog.text
    assert not (tmp_path / CHECKED_NAME).exists()


def test_a_check_that_was_never_started_is_closed_in_silence(files, tmp_path, caplog):
    caplog.set_level("INFO", logger="srepa_ds")
    ContentCheck(files, remembered_in=tmp_path / CHECKED_NAME).close()
    assert caplog.text == ""


def test_small_data_are_those_below_a_limit(files):
    assert are_small(files)
    assert not are_small([*files, files[0]._replace(num_bytes=256 << 20)])
