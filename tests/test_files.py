"""Files that are whole or not there, and files that ship with the package."""

from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.files import locked, shipped, write_aside


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
