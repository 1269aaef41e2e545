"""Files that are whole or not there, and files that ship with the package."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.data.shard_index import read_index
from srepa_ds.errors import ConfigError, DataError, OutputError
from srepa_ds.files import claimed, expanded, locked, shipped, write_aside
from srepa_ds.trees import load_tree
from srepa_ds.zero.json_file import load_deepspeed_json


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, concurrent):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_aside(path, fail, concurrent=concurrent)
    assert path.read_text() == "before"
    write_aside(path, lambda aside: aside.write_text("after"), concurrent=concurrent)
    assert path.read_text() == "after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped(Path("ds_configs/zero2.json")) == ROOT / "ds_configs/zero2.json"
    assert shipped(Path("ds_configs/none.json")) == Path("ds_configs/none.json")
    own = tmp_path / "ds_configs" / "zero2.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert shipped(Path("ds_configs/zero2.json")).resolve() == own


def test_a_locked_folder_is_free_again_afterwards(tmp_path):
    with locked(tmp_path):
        # Another open file is another owner, be it of the same process.
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none"):
        pass


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "{home}"), ("~/runs/x", "{home}/runs/x"), ("~root/x", "/root/x"),
        ("$PLACE/x", "{home}/x"), ("a/${PLACE_2}b", "a/twob"), ("a~/$", "a~/$"),
        ("cost$5", "cost$5"), ("a/~", "a/~"), ("plain/x y", "plain/x y"), ("$TILDE/x", "{home}/x"),
        ("a$$PLACE", "a$PLACE"),
    ],
)  # fmt: skip
def test_what_a_path_stands_for(tmp_path, monkeypatch, path, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("PLACE_2", "two")
    monkeypatch.setenv("TILDE", "~")
    assert expanded(Path(path)) == Path(expected.format(home=tmp_path))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$NOT_SET_ANYWHERE/x", "environment variable 'NOT_SET_ANYWHERE' is not set"),
        ("a/${not set}", "environment variable 'not set' is not set"),
        ("${}", "${} names no environment variable; write $$ for a dollar sign"),
        ("~nobody_of_that_name/x", "home folder of ~nobody_of_that_name is not known"),
        ("a\0b", "cannot hold the character NUL"),
        ("a/" + "é" * 128, "is too long: it has 256 bytes"),
        ("long/" * 800, "longer than 3800 bytes"),
    ],
)
def test_a_path_that_stands_for_nothing(path, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        expanded(Path(path))


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x" * 300, "a\0b", "loop"):
        Path("loop").is_symlink() or Path("loop").symlink_to("loop")
        assert shipped(Path(name)) == Path(name)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Drops root's right to read everything while the block runs."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def closed(tmp_path) -> Iterator[Path]:
    """A folder without any permission."""
    folder = tmp_path / "closed"
    (folder / "sub").mkdir(parents=True)
    (folder / "file.yaml").write_text("a: 1\n")
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


def test_a_folder_without_permission(closed):
    with as_ordinary_user():
        assert shipped(closed / "file.yaml") == closed / "file.yaml"
        with pytest.raises(ConfigError, match="Permission denied"):
            load_tree(closed / "file.yaml")
        with pytest.raises(ConfigError, match="Permission denied"):
            load_deepspeed_json(closed / "ds.json")
        with pytest.raises(DataError, match="Permission denied; make it readable"):
            read_index(closed / "sub")
        claim = claimed(closed / "new", doing="training in", cure="choose another")
        with pytest.raises(OutputError, match="Permission denied; choose another"), claim:
            raise AssertionError("it was claimed")


def test_a_dangling_link_as_a_folder_is_named(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for folder in (link, link / "below"):
        claim = claimed(folder, doing="training in", cure="choose another")
        words = f"{link} is a link to {tmp_path}/gone, which does not exist; choose another"
        with pytest.raises(OutputError, match=re.escape(words)), claim:
            raise AssertionError("it was claimed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]
