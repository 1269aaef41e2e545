"""The tests' own ranks: none waits for a reader."""

import subprocess
import sys

import pytest
from ranks import Rank, run_worker


def test_ranks_that_print_a_megabyte_each_before_they_meet_do_not_hang():
    outputs = run_worker("flood", 2)
    assert [len(said) > 4 << 20 for said in outputs] == [True, True]
    for rank, said in enumerate(outputs):
        assert f"round 1 of rank {rank}: x" in said


def test_a_rank_that_does_not_end_in_time_is_reported():
    sleeper = Rank([sys.executable, "-c", "import time; time.sleep(60)"], {}, None)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            sleeper.output(seconds=0.1)
    finally:
        sleeper.kill()
    assert sleeper.output(seconds=10) == ""
