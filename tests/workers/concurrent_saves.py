"""Checks saves beside training on each of two ranks. Usage: concurrent_saves.py FOLDER [killed].

With `killed` rank 1 is killed while it saves.
"""

import os
import resource
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from srepa_ds.checkpoint.folder import (
    LATEST,
    fault_of,
    newest_valid,
    step_folder,
    step_of,
    steps_in,
)
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.retention import CheckpointConfig
from srepa_ds.checkpoint.writer import CheckpointWriter
from srepa_ds.distributed import ranks
from srepa_ds.errors import OutputError

NUMEL = 300_000
CONFIG = CheckpointConfig(keep_last=2, keep_every_steps=0, asynchronous=True)


class Training:
    """A weight, half on each rank, and steps that add one to it."""

    def __init__(self, rank: int):
        self.rank = rank
        self.weight = torch.zeros(NUMEL // 2)
        self.state = {"count": [0]}
        self.step_count = 0

    def step(self) -> None:
        self.weight.add_(1)
        self.step_count += 1
        self.state["count"][0] = self.step_count
        # Training's own collectives, meanwhile.
        total = torch.ones(())
        dist.all_reduce(total)
        assert total == 2

    def save(self, writer: CheckpointWriter) -> None:
        piece = Piece("master", "w", (NUMEL,), self.rank * (NUMEL // 2), self.weight)
        writer.save(step=self.step_count, pieces=[piece], state=self.state)


def newest_step(root: Path) -> int | None:
    """Returns the step that the pointer names, or None without one."""
    pointer = root / LATEST
    return step_of(root / pointer.read_text().strip()) if pointer.exists() else None


def assert_holds(folder: Path, step: int) -> None:
    reader = CheckpointReader(folder)
    assert fault_of(folder) is None
    assert torch.equal(reader.tensor("master", "w"), torch.full((NUMEL,), float(step)))
    assert reader.state["count"] == [step]
    assert reader.state["step"] == step


def the_moment_of_the_save_is_what_is_stored(root: Path, rank: int) -> None:
    training = Training(rank)
    with closing(CheckpointWriter(root, CONFIG, rank=rank)) as writer:
        finished = []
        for _ in range(60):
            training.step()
            if training.step_count in (3, 4, 40):
                training.save(writer)
            writer.poll()
            # The main rank deletes old ones after all have agreed.
            ranks.barrier()
            finished.append(newest_step(root))
        writer.wait()
        # The save of step 4 finishes that of step 3 if no poll did.
        assert finished[2] in (None, 3), finished
        assert finished[3] in (3, 4), finished
        assert {4} <= set(finished) <= {None, 3, 4, 40}, finished
        assert ranks.gather(finished) == [finished, finished]
    ranks.barrier()
    for step in (4, 40):
        assert_holds(step_folder(root, step), step)
    assert [folder.name for folder in steps_in(root)] == ["step-0000004", "step-0000040"]
    assert {path.name for path in root.iterdir()} == {"latest", "step-0000004", "step-0000040"}


def train_on(training: Training, writer: CheckpointWriter, ending: str) -> None:
    for _ in range(100_000):
        training.step()
        if ending == "poll":
            writer.poll()
        elif ending == "wait":
            writer.wait()
        else:
            training.save(writer)


def a_full_disk_of_one_rank_is_an_error_on_both(root: Path, rank: int) -> None:
    for ending in ("poll", "wait", "save"):
        place = root / ending
        training = Training(rank)
        with closing(CheckpointWriter(place, CONFIG, rank=rank)) as writer:
            training.step()
            training.save(writer)
            writer.wait()
            assert newest_step(place) == 1
            training.step()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            limit = NUMEL if rank == 1 else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            training.save(writer)
            with pytest.raises(OutputError, match=r"cannot write .* File too large") as met:
                train_on(training, writer, ending)
            assert met.value.on_all_ranks
            assert len(set(ranks.gather(training.step_count))) == 1
            ranks.barrier()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert {path.name for path in place.iterdir()} == {"latest", "step-0000001"}
            # The next save has room.
            training.step()
            step = training.step_count
            training.save(writer)
            writer.wait()
        assert_holds(step_folder(place, step), step)


def a_place_that_is_a_file_is_an_error_at_once(root: Path, rank: int) -> None:
    place = root / "file"
    ranks.on_main(lambda: (root.mkdir(), place.write_text("mine")))
    training = Training(rank)
    for config in (CONFIG, CheckpointConfig()):
        with closing(CheckpointWriter(place, config, rank=rank)) as writer:
            with pytest.raises(OutputError, match="cannot write the checkpoint"):
                training.save(writer)
            writer.wait()


def synchronous_ones_are_whole_when_saved(root: Path, rank: int) -> None:
    training = Training(rank)
    writer = CheckpointWriter(root, CheckpointConfig(keep_last=1, keep_every_steps=0), rank=rank)
    with closing(writer):
        for _ in range(2):
            training.step()
            training.save(writer)
            assert newest_valid(root) == step_folder(root, training.step_count)
            ranks.barrier()
        writer.poll()
        writer.wait()
    ranks.barrier()
    assert_holds(step_folder(root, 2), 2)
    assert len(steps_in(root)) == 1


def who_leaves_leaves_the_previous_one(root: Path, rank: int) -> None:
    training = Training(rank)
    with closing(CheckpointWriter(root, CONFIG, rank=rank)) as writer:
        training.step()
        training.save(writer)
        writer.wait()
        training.step()
        training.save(writer)
    ranks.barrier()
    assert newest_valid(root) == step_folder(root, 1)
    assert (root / ".writing-step-0000002").is_dir()
    with closing(CheckpointWriter(root, CONFIG, rank=rank)) as writer:
        training.step()
        training.save(writer)
        writer.wait()
        assert newest_step(root) == 3
    # The main rank tidies up after all have agreed.
    ranks.barrier()
    assert not list(root.glob(".writing*"))


def killed_while_writing(root: Path, rank: int) -> None:
    """Kills rank 1 after it starts to save and before the checkpoint can be finished."""
    training = Training(rank)
    writer = CheckpointWriter(root, CONFIG, rank=rank)
    training.step()
    training.save(writer)
    writer.wait()
    training.step()
    training.save(writer)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        writer.wait()
    assert newest_valid(root) == step_folder(root, 1)
    assert_holds(step_folder(root, 1), 1)


CASES = (
    the_moment_of_the_save_is_what_is_stored,
    a_full_disk_of_one_rank_is_an_error_on_both,
    a_place_that_is_a_file_is_an_error_at_once,
    synchronous_ones_are_whole_when_saved,
    who_leaves_leaves_the_previous_one,
)


def main(root: Path, kill: bool) -> None:
    torch.set_num_threads(1)
    rank = ranks.initialize()
    if kill:
        killed_while_writing(root / "killed", rank.number)
        os._exit(0)
    for case in CASES:
        case(root / case.__name__, rank.number)
        ranks.barrier()
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), kill=sys.argv[2:] == ["killed"])
