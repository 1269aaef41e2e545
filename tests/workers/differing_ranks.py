"""Command lines that go wrong on one of two ranks only. Usage: differing_ranks.py FOLDER.

FOLDER holds a small world. Rank 0 says once what is wrong, rank 1 nothing, and both end alike.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

from srepa_ds.cli import run
from srepa_ds.distributed import ranks
from srepa_ds.training import run_folder


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
    ranks.barrier()


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    config = str(folder / "experiment.yaml")

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
    files_that_differ(folder, rank)
    run_folders_that_differ(folder, rank)
    a_record_that_cannot_be_written(folder, rank)
    ranks.leave(0)


def files_that_differ(folder: Path, rank: int) -> None:
    """Each rank's working directory has data and DeepSpeed's JSON of its own."""
    own = folder / f"of-{rank}"
    shutil.copytree(folder / "shards", own / "shards")
    if rank == 1:
        index = json.loads((own / "shards" / "index.json").read_text())
        index["shards"][0]["sha256"] = "0" * 64
        (own / "shards" / "index.json").write_text(json.dumps(index))
    document = {"zero_optimization": {"stage": 1 + rank}}
    (own / "ds.json").write_text(json.dumps(document))
    os.chdir(own)
    words = (
        "ranks see different files behind the same paths; give all of them the same: 2 faults",
        "data.shards: '",
        "engine.deepspeed.zero_optimization.stage: 1 on rank 0 (",
    )
    here = ["data.folder=shards", "engine.deepspeed=ds.json"]
    assert_one_voice(rank, ["train", str(folder / "experiment.yaml"), *here], *words)
    assert not (folder / "run").exists()


def run_folders_that_differ(folder: Path, rank: int) -> None:
    """In each rank's working directory, as on disks of their own."""
    run_folder._NEWS_SECONDS = 0.2
    words = ("does not see the run's folder", "of-1/runs/mine", "met by rank 1 (")
    where = "run.folder=runs/mine"
    assert_one_voice(rank, ["train", str(folder / "experiment.yaml"), where], *words)
    assert not Path("runs").exists()


def a_record_that_cannot_be_written(folder: Path, rank: int) -> None:
    """The main rank alone writes it."""
    if rank == 0:
        (folder / "run" / "metrics.jsonl").mkdir(parents=True)
    ranks.barrier()
    words = ("cannot write to the run's folder", "Is a directory")
    assert_one_voice(rank, ["train", str(folder / "experiment.yaml")], *words)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
