"""An error on one rank of two is reported once, and both ranks end alike."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_function, start_function

from srepa_ds.cli import main, run
from srepa_ds.distributed import ranks
from srepa_ds.training import claim


def assert_one_voice(rank: int, arguments: list[str], *words: str) -> None:
    """Runs a command line on this rank and checks what it says and returns."""
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


def command_lines_that_differ(folder: Path, rank: int) -> None:
    """Gives the ranks different files, and different overrides of the same one."""
    config = str(folder / "experiment.yaml")
    other = config if rank == 0 else str(folder / "nowhere.yaml")
    for command in (["train"], ["sample"], ["prepare", "--teacher"]):
        words = ("nowhere.yaml: 1 fault", "No such file", "met by rank 1 (")
        assert_one_voice(rank, [*command, other], *words)
    rate = f"optimizer.learning_rate={0.001 * (rank + 1)}"
    words = (
        "ranks were given different settings; give them all the same file and overrides: 2 faults",
        "optimizer.learning_rate: 0.001 on rank 0 (",
        "0.002 on rank 1 (",
        "run.seed: 0 on rank 0 (",
    )
    assert_one_voice(rank, ["train", config, rate, f"run.seed={7 * rank}"], *words)


def files_that_differ(folder: Path, rank: int) -> None:
    """Gives each rank its own working directory with its own data and DeepSpeed JSON."""
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
    """Writes to each rank's own working directory, as if each had its own disk."""
    claim._NEWS_SECONDS = 0.2
    words = ("does not see the run's folder", "of-1/runs/mine", "met by rank 1 (")
    where = "run.folder=runs/mine"
    assert_one_voice(rank, ["train", str(folder / "experiment.yaml"), where], *words)
    assert not Path("runs").exists()


def a_record_that_cannot_be_written(folder: Path, rank: int) -> None:
    """Puts a folder where the main rank writes its record."""
    if rank == 0:
        (folder / "run" / "metrics.jsonl").mkdir(parents=True)
    ranks.barrier()
    words = ("cannot write", "metrics.jsonl: Is a directory", "move it away")
    assert_one_voice(rank, ["train", str(folder / "experiment.yaml")], *words)


def all_that_differs(name: str) -> None:
    """Goes through all of these cases on this rank: starting ranks takes longer than any."""
    folder, rank = Path(name), int(os.environ["RANK"])
    command_lines_that_differ(folder, rank)
    files_that_differ(folder, rank)
    run_folders_that_differ(folder, rank)
    a_record_that_cannot_be_written(folder, rank)


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_said_once(small_world, tmp_path):
    run_function(all_that_differs, 2, small_world.copied_to(tmp_path / "world").folder)


def train_with_gpus(seen_by_rank_1: int) -> None:
    """Trains where rank 1 sees GPUs and rank 0 none."""
    if os.environ["RANK"] == "1":
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: seen_by_rank_1
        torch.cuda.set_device = lambda _: None
    else:
        torch.cuda.is_available = lambda: False
    sys.argv[1:] = ["train", "nowhere.yaml"]
    main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seen", "words"),
    [
        # Local rank 1 needs the second one.
        (1, ("rank 1 (", "local rank 1 has no GPU: this node shows 1;")),
        (2, ("rank 0 (", "sees no GPU, rank 1 (", "has one; repair the driver")),
    ],
)
def test_ranks_that_cannot_join_say_so_once_and_end_together(seen, words, tmp_path):
    processes = start_function(train_with_gpus, 2, seen, results=tmp_path)
    outputs = [process.output() for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert outputs[0].count("error:") == 1
    assert not [word for word in words if word not in outputs[0]], outputs
    assert "error" not in outputs[1]
    assert "Traceback" not in outputs[0] + outputs[1]
