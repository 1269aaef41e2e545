"""A run's folder: one training at a time, and seen by all ranks."""

from shutil import rmtree

import pytest

from srepa_ds.errors import OutputError
from srepa_ds.run_folder import RunFolder
from srepa_ds.training.claim import check_shared, claimed


def test_a_second_training_is_kept_out(tmp_path):
    run = RunFolder(tmp_path / "run")
    with claimed(run, is_main=True):
        second = claimed(run, is_main=True)
        with pytest.raises(OutputError, match=r"another process .* is training in"), second:
            raise AssertionError("two trainings share a folder")
        with claimed(run, is_main=False):
            pass
    with claimed(run, is_main=True):
        pass


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    run = RunFolder(tmp_path / "runs" / "run")
    with claimed(run, is_main=True):
        assert run.path.is_dir()
    assert not list(tmp_path.iterdir())
    with claimed(run, is_main=True):
        (run.path / "kept").touch()
    assert (run.path / "kept").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    with claimed(RunFolder(mine), is_main=True):
        pass
    assert mine.is_dir()


def test_looking_whether_the_folder_is_shared_leaves_nothing(tmp_path):
    check_shared(RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="cannot write to the run's folder"):
        check_shared(RunFolder(tmp_path / "none"))


def moved(folder) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder) -> None:
    moved(folder)
    folder.mkdir()


def below_a_file(folder) -> None:
    moved(folder.parent)
    folder.parent.write_text("a file")


@pytest.mark.parametrize("lose", [rmtree, moved, replaced, below_a_file])
def test_a_folder_that_goes_away_meanwhile_is_missed(tmp_path, lose):
    run = RunFolder(tmp_path / "runs" / "run")
    with claimed(run, is_main=True) as claim:
        (run.path / "config.yaml").touch()
        claim.check()
        lose(run.path)
        with pytest.raises(OutputError, match=r"runs/run was removed, moved or replaced") as error:
            claim.check()
    assert error.value.on_all_ranks


def test_a_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with claimed(RunFolder(tmp_path / "link" / "run"), is_main=True) as claim:
        claim.check()
