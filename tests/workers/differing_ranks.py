"""Command lines that go wrong on one of two ranks only. Usage: differing_ranks.py FOLDER.

FOLDER holds a small world. Rank 0 says once what is wrong, rank 1 nothing, and both end alike.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

from srepa_ds import distributed
from srepa_ds.cli import run


def assert_one_voice(rank: int, arguments: list[str], *words: str) -> None:
    """Runs a command line on this rank, and holds what both ranks did against what they should."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run(arguments)
    text = said.getvalue()
    assert code == 2, (code, text)
    assert "Traceback" not in text
    assert text.count("error:") == (rank == 0), text
    if rank == 0:
        message = text[text.index("error:") :]
        assert not [word for word in words if word not in message], message
    distributed.barrier()


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    config = str(folder / "experiment.yaml")
    before = sorted(folder.rglob("*"))

    other = config if rank == 0 else str(folder / "nowhere.yaml")
    for command in (["train"], ["sample"], ["prepare", "--teacher"]):
        words = ("nowhere.yaml: 1 fault", "No such file", "met by rank 1 (")
        assert_one_voice(rank, [*command, other], *words)
    rate = f"optimizer.learning_rate={0.001 * (rank + 1)}"
    words = (
        "ranks were given different settings; give all the same file and overrides: 2 faults",
        "optimizer.learning_rate: 0.001 on rank 0 (",
        "0.002 on rank 1 (",
        "run.seed: 0 on rank 0 (",
    )
    assert_one_voice(rank, ["train", config, rate, f"run.seed={7 * rank}"], *words)
    distributed.barrier()
    assert sorted(folder.rglob("*")) == before
    distributed.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
