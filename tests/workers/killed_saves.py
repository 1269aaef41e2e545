"""Saves checkpoints repeatedly in child processes that are killed at random moments.

Usage: killed_saves.py FOLDER KILLS MODE. After each kill the newest checkpoint must be readable.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.retention import CheckpointConfig
from srepa_ds.checkpoint.writer import CheckpointWriter

NUMEL = 50_000
SAVE_EVERY = 6


def save_for_ever(root: Path, first: int, mode: str) -> None:
    """Sets all weights to the step and saves every sixth step, until killed."""
    config = CheckpointConfig(keep_last=2, keep_every_steps=0, asynchronous=mode == "asynchronous")
    writer = CheckpointWriter(root, config, rank=0)
    weights = torch.empty(NUMEL)
    step = first
    while True:
        weights.fill_(step)
        if step % SAVE_EVERY == 0:
            piece = Piece("master", "w", (NUMEL,), 0, weights)
            writer.save(step=step, pieces=[piece], state={"step": step})
        writer.poll()
        step += 1


def newest_step(root: Path) -> int:
    """Reads the newest valid checkpoint and returns its step, -1 without one."""
    folder = newest_valid(root)
    if folder is None:
        return -1
    reader = CheckpointReader(folder)
    step = reader.state["step"]
    assert torch.equal(reader.tensor("master", "w"), torch.full((NUMEL,), float(step)))
    return step


def main(root: Path, kills: int, mode: str) -> None:
    moments = random.Random(0)
    before = -1
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            save_for_ever(root, before + 1, mode)
        time.sleep(moments.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = newest_step(root)
        assert now >= before, f"step {before} was lost: {now}"
        before = now
    assert before > 0, "no save was ever finished"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
