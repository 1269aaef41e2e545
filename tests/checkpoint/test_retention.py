"""Retention: the checkpoints that are kept, and the one that a run rolls back to."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from srepa_ds.checkpoint.folder import named, newest_valid, step_folder
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.retention import (
    CheckpointConfig,
    RollbackPoint,
    mark_good,
    prune,
    rollback_point,
)
from srepa_ds.checkpoint.saving import save
from srepa_ds.checkpoint.writer import CheckpointWriter

FRAGMENTS = "fragments-00000.safetensors"
PIECE = Piece("master", "w", (3,), 0, torch.zeros(3))


def write(root: Path, steps: Iterable[int], *, good: Iterable[int] = ()) -> None:
    for step in steps:
        save(root, step=step, pieces=[PIECE], state={}, rank=0)
    for step in good:
        mark_good(root, step)


def steps(root: Path, *, prefix: str = "") -> list[int]:
    return [int(folder.name[-7:]) for folder in sorted(named(root, prefix))]


def config(**changes: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"keep_last": 2, "keep_every_steps": 0, **changes})


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"keep_last": 1}, [12]),
        ({}, [10, 12]),
        ({"keep_every_steps": 4}, [4, 8, 10, 12]),
        # Some were saved later than due, some in between.
        ({"keep_last": 1, "keep_every_steps": 5}, [6, 10, 12]),
        ({"keep_last": 1, "keep_every_steps": 3}, [4, 6, 10, 12]),
        ({"keep_last": 9}, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_retention_is_the_same_at_once_and_on_the_way(tmp_path, changes, kept):
    write(tmp_path / "at once", range(2, 14, 2))
    prune(tmp_path / "at once", config(**changes), newest=12)
    for step in range(2, 14, 2):
        write(tmp_path / "on the way", [step])
        prune(tmp_path / "on the way", config(**changes), newest=step)
    assert steps(tmp_path / "at once") == kept
    assert steps(tmp_path / "on the way") == kept


def test_a_damaged_later_checkpoint_does_not_crowd_out_the_good_ones(tmp_path):
    """A run that resumed before a damaged checkpoint keeps what it saves meanwhile."""
    write(tmp_path, [10, 20, 15])
    (step_folder(tmp_path, 20) / FRAGMENTS).unlink()
    prune(tmp_path, config(keep_last=1), newest=15)
    assert steps(tmp_path) == [15, 20]
    assert newest_valid(tmp_path) == step_folder(tmp_path, 15)


def test_the_newest_good_one_stays_until_a_newer_is_known_to_be_good(tmp_path):
    write(tmp_path, [5, 10, 15], good=[5, 10])
    prune(tmp_path, config(keep_last=1), newest=15)
    assert steps(tmp_path) == [10, 15]
    mark_good(tmp_path, 15)
    prune(tmp_path, config(keep_last=1), newest=15)
    assert steps(tmp_path) == [15]


def test_a_run_that_fails_goes_back_to_the_newest_good_one_and_so_does_who_resumes(tmp_path):
    write(tmp_path, [5, 10, 15, 16], good=[5, 10])
    back = RollbackPoint(step_folder(tmp_path, 10), is_good=True)
    assert rollback_point(tmp_path) == back
    assert newest_valid(tmp_path) == back.folder
    assert steps(tmp_path, prefix="failed-") == [15, 16]
    # It fails there again, and what it saved in the meantime replaces the earlier folder.
    write(tmp_path, [15])
    assert rollback_point(tmp_path) == back
    assert (steps(tmp_path), steps(tmp_path, prefix="failed-")) == ([5, 10], [15, 16])
    # It gets past that step.
    write(tmp_path, [15])
    prune(tmp_path, config(), newest=15)
    assert (steps(tmp_path), steps(tmp_path, prefix="failed-")) == ([10, 15], [16])


def test_without_a_good_one_it_is_the_newest_valid(tmp_path):
    assert rollback_point(tmp_path) is None
    write(tmp_path, [5, 10, 15])
    (step_folder(tmp_path, 15) / FRAGMENTS).unlink()
    assert rollback_point(tmp_path) == RollbackPoint(step_folder(tmp_path, 10), is_good=False)
    assert steps(tmp_path) == [5, 10, 15]


def test_a_good_one_that_is_damaged_is_passed_over(tmp_path):
    write(tmp_path, [5, 10, 15], good=[5, 10])
    (step_folder(tmp_path, 10) / FRAGMENTS).unlink()
    assert rollback_point(tmp_path) == RollbackPoint(step_folder(tmp_path, 5), is_good=True)


def test_to_mark_what_is_not_there_makes_nothing(tmp_path):
    mark_good(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def good_steps(root: Path) -> list[int]:
    return [step for step in steps(root) if (step_folder(root, step) / "good").exists()]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_good_once_a_later_step_was_applied(tmp_path, asynchronous):
    changes = config(keep_last=1, asynchronous=asynchronous)
    writer = CheckpointWriter(tmp_path, changes, rank=0)
    for step in (4, 8):
        writer.note_applied(step)
        writer.save(step=step, pieces=[PIECE], state={})
    writer.wait()
    assert (steps(tmp_path), good_steps(tmp_path)) == ([4, 8], [4])
    writer.note_applied(9)
    assert (steps(tmp_path), good_steps(tmp_path)) == ([8], [8])
    # A step that was applied while a checkpoint was in progress counts as well.
    writer.save(step=10, pieces=[PIECE], state={})
    writer.note_applied(11)
    writer.wait()
    assert (steps(tmp_path), good_steps(tmp_path)) == ([10], [10])
    # After a rollback, the steps that were taken back do not count.
    writer.save(step=12, pieces=[PIECE], state={})
    writer.wait()
    writer.restart_at(10)
    writer.note_applied(11)
    writer.save(step=11, pieces=[PIECE], state={})
    writer.wait()
    assert good_steps(tmp_path) == [10]
    writer.close()


def test_a_run_that_resumes_proves_what_it_resumed_from(tmp_path):
    write(tmp_path, [5])
    writer = CheckpointWriter(tmp_path, config(), rank=0, step=5)
    assert good_steps(tmp_path) == []
    writer.note_applied(6)
    assert good_steps(tmp_path) == [5]
