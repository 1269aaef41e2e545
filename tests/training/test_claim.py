"""A run's folder: one training at a time, and seen by all ranks."""

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
