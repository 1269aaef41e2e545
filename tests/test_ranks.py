"""The ranks that tests start: what they print is read, what they return comes back."""

import os
import subprocess
import sys

import pytest
from ranks import RankProcess, outputs_of, run_function, start_function

from srepa_ds.distributed import ranks


def print_a_megabyte_and_meet() -> None:
    """Prints 1 MB to each stream before it meets the other ranks, twice."""
    rank = ranks.initialize()
    for number in range(2):
        for stream in (sys.stdout, sys.stderr):
            stream.write(f"round {number} of rank {rank.number}: " + "x" * (1 << 20) + "\n")
            stream.flush()
        ranks.barrier()


def test_ranks_that_print_a_megabyte_each_before_they_meet_do_not_hang(tmp_path):
    outputs = outputs_of(start_function(print_a_megabyte_and_meet, 2, results=tmp_path))
    assert [len(said) > 4 << 20 for said in outputs] == [True, True]
    for rank, said in enumerate(outputs):
        assert f"round 1 of rank {rank}: x" in said


def test_a_rank_that_does_not_end_in_time_is_reported():
    sleeper = RankProcess([sys.executable, "-c", "import time; time.sleep(60)"], {}, None, [])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.output(seconds=0.1)
    finally:
        sleeper.kill()
    assert sleeper.output(seconds=10) == ""


def gathered(*given) -> dict:
    """Returns what this rank was given and knows, and what it hears from the others."""
    rank = ranks.initialize()
    return {
        "given": given,
        "rank": [rank.number, rank.world_size],
        "process": os.getpid(),
        "of all": ranks.gather(10 * rank.number),
    }


def test_a_function_runs_on_fresh_ranks_and_its_results_come_back(tmp_path):
    returned = run_function(gathered, 2, tmp_path, ["a", 1], {"b": None})
    for number, found in enumerate(returned):
        assert found["given"] == [str(tmp_path), ["a", 1], {"b": None}]
        assert found["rank"] == [number, 2]
        assert found["of all"] == [0, 10]
    assert len({os.getpid(), *(found["process"] for found in returned)}) == 3


def fails_on_the_last(words: str) -> None:
    """Fails on rank 1 alone."""
    if os.environ["RANK"] == "1":
        raise ValueError(words)
    print("all is well")


def test_the_output_of_the_rank_that_fails_is_the_error():
    with pytest.raises(AssertionError, match=r"ranks \[1\] failed:\n(.*\n)+ValueError: a bad disk"):
        run_function(fails_on_the_last, 2, "a bad disk")


def test_a_function_that_ranks_cannot_import_is_refused():
    with pytest.raises(ValueError, match="<lambda>; move it to the top level of its file"):
        run_function(lambda: None, 1)
