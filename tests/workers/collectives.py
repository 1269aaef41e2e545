"""Checks collectives and shared errors on each of two ranks. Usage: collectives.py FOLDER."""

import io
import re
import resource
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from srepa_ds.checkpoint.folder import newest_valid
from srepa_ds.checkpoint.fragment_file import Piece
from srepa_ds.checkpoint.reader import CheckpointReader
from srepa_ds.checkpoint.saving import save
from srepa_ds.distributed import ranks
from srepa_ds.errors import CheckpointError, ConfigError, Fault, OutputError, RankError, SRepaError
from srepa_ds.telemetry.window import Window


def error_of(mine: SRepaError | None) -> SRepaError:
    """Returns the error that `together` raises here when `mine` is raised on this rank."""

    def action() -> None:
        if mine is not None:
            raise mine

    with pytest.raises(SRepaError) as caught:
        ranks.together(action)
    return caught.value


def values(rank: int) -> None:
    """Checks that values travel between ranks."""
    assert ranks.world_size() == 2
    assert ranks.rank() == rank
    assert ranks.joined()
    assert ranks.gather(("rank", rank)) == [("rank", 0), ("rank", 1)]
    mine = ranks.gather_on_main(("rank", rank))
    assert mine == ([("rank", 0), ("rank", 1)] if rank == 0 else [])
    assert ranks.broadcast(f"from {rank}") == "from 0"
    assert ranks.broadcast(f"from {rank}", source=1) == "from 1"
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    assert ranks.summed(mine).tolist() == [3, 30]
    assert ranks.averaged(mine).tolist() == [1.5, 15]
    assert mine.tolist() == [1.0 + rank, 10.0 + 10 * rank]
    for flag in (False, True):
        assert ranks.any_rank(flag and rank == 1) == flag
    window = Window()
    for loss in (1.0, 3.0):
        window.add({"loss": torch.tensor(loss + 4 * rank)})
    assert window.close().scalars()["loss"] == 4.0


def errors(rank: int) -> None:
    """Checks that an error on one rank is raised on both, and that both go on."""
    assert ranks.together(lambda: rank) == rank
    for failing in (0, 1):
        error = error_of(OutputError("no room") if rank == failing else None)
        assert type(error) is OutputError
        assert str(error) == "no room"
        assert error.on_all_ranks
        notes = getattr(error, "__notes__", [])
        assert len(notes) == (rank != failing)
        assert all(note.startswith(f"met by rank {failing} (") for note in notes)
        faults = [Fault("a.b", "wrong"), Fault("c", "worse")]
        error = error_of(ConfigError("file", faults) if rank == failing else None)
        assert type(error) is ConfigError
        assert error.faults == tuple(faults)
        assert str(error) == str(ConfigError("file", faults))
    error = error_of(CheckpointError(f"of rank {rank}"))
    assert str(error) == f"of rank {rank}"
    assert error.on_all_ranks


def unforeseen(rank: int) -> None:
    """Checks that an unexpected error leaves no rank waiting."""

    def action() -> None:
        if rank == 1:
            raise RuntimeError("out of memory")

    printed = io.StringIO()
    with redirect_stderr(printed), pytest.raises(RankError) as caught:
        ranks.together(action)
    assert re.match(r"rank 1 \(.+\) failed: RuntimeError: out of memory", str(caught.value))
    assert caught.value.on_all_ranks
    assert caught.value.exit_code == 1
    assert ("in action" in printed.getvalue()) == (rank == 1)
    assert isinstance(caught.value.__cause__, RuntimeError) == (rank == 1)
    assert ranks.together(lambda: rank) == rank


def facts(rank: int) -> None:
    """Checks that facts that differ are named on both ranks, each with two ranks' values."""
    ranks.check_same({"a": 1, "b": None}, what="same")
    with pytest.raises(ConfigError) as caught:
        ranks.check_same({"a": 1, "b": rank, "c" * (rank + 1): [2]}, what="not same")
    by_path = {fault.path: fault.message for fault in caught.value.faults}
    assert caught.value.source == "not same"
    assert by_path.keys() == {"b", "c", "cc"}
    assert re.fullmatch(r"0 on rank 0 \(.+\), 1 on rank 1 \(.+\)", by_path["b"])
    assert by_path["cc"].startswith("None on rank 0 (")
    assert caught.value.on_all_ranks


def checkpoints(rank: int, root: Path) -> None:
    """Checks that every rank writes its share of a checkpoint, and that all or none count."""
    whole = torch.arange(50.0)
    start, stop = (0, 20) if rank == 0 else (20, 50)

    def save_step(step: int) -> Path:
        pieces = [Piece("master", "w", (5, 10), start, whole[start:stop] + step)]
        pieces += [Piece("ema", f"only{rank}", (1,), 0, torch.ones(1))]
        return save(root, step=step, pieces=pieces, state={"note": "same"}, rank=rank)

    reader = CheckpointReader(save_step(1))
    assert torch.equal(reader.tensor("master", "w"), whole.view(5, 10) + 1)
    assert reader.names("ema") == ["only0", "only1"]
    seen = root / ("step-0000001" if rank == 0 else "nowhere")
    with pytest.raises(CheckpointError, match="every rank needs the run's folder") as caught:
        ranks.together(lambda: CheckpointReader(seen))
    assert caught.value.on_all_ranks
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for failing in (0, 1):
        ranks.barrier()
        if rank == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(OutputError, match="earlier checkpoints are whole"):
            save_step(2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        ranks.barrier()
        assert newest_valid(root) == root / "step-0000001"
        assert {path.name for path in root.iterdir()} == {"step-0000001", "latest"}
    ranks.barrier()
    assert newest_valid(save_step(2).parent) == root / "step-0000002"


if __name__ == "__main__":
    rank = ranks.initialize()
    values(rank.number)
    errors(rank.number)
    unforeseen(rank.number)
    facts(rank.number)
    checkpoints(rank.number, Path(sys.argv[1]))
    ranks.leave(0)
