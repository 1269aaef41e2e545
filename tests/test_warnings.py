"""Warnings: which fail a test, and which of them a user sees."""

import re
import subprocess
import sys
import warnings

import pytest
from places import ROOT
from ranks import outputs_of, start_function
from torch.utils.data import DataLoader

from srepa_ds.console import WarningsOnce, show_warnings_once
from srepa_ds.distributed import ranks


@pytest.mark.parametrize("module", ["srepa_ds.engine", "tests.test_engine", "ranks"])
def test_a_warning_at_our_lines_fails_a_test(module):
    with pytest.raises(FutureWarning):
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module=module)


def test_of_other_packages_lines_only_what_says_something_about_us_does():
    for category in (RuntimeWarning, ResourceWarning):
        with pytest.raises(category):
            warnings.warn_explicit("bad", category, "file.py", 1, module="numpy.linalg")
    with pytest.warns(FutureWarning) as seen:
        warnings.warn_explicit("old", FutureWarning, "file.py", 1, module="triton.runtime")
    assert len(seen) == 1


@pytest.fixture
def once(monkeypatch):
    """Returns a new one for a rank; those of the tests themselves are not in its way."""

    def of_rank(number: int) -> WarningsOnce:
        monkeypatch.setenv("RANK", str(number))
        return WarningsOnce()

    return of_rank


ELSEWHERE = "/site-packages/torch/distributed/c10d.py"
OURS = str(ROOT / "srepa_ds" / "engine.py")


def shown(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_another_package_repeats_is_shown_once(once, caplog):
    rank = once(0)
    for text in ("old", "old", "new", "old"):
        rank.show(FutureWarning(text), FutureWarning, ELSEWHERE, 7)
    rank.show(FutureWarning("old"), FutureWarning, ELSEWHERE, 8)
    assert shown(caplog) == [
        "FutureWarning: old (torch/distributed/c10d.py:7; shown once)",
        "FutureWarning: new (torch/distributed/c10d.py:7; shown once)",
        "FutureWarning: old (torch/distributed/c10d.py:8; shown once)",
    ]


def test_warnings_at_our_own_lines_are_shown_on_every_rank(once, caplog):
    for number in (0, 3):
        rank = once(number)
        rank.agree_by(lambda _text: False)
        for _ in range(3):
            rank.show(UserWarning("ours"), UserWarning, OURS, 7)
            rank.show(UserWarning("theirs"), UserWarning, ELSEWHERE, 7)
    assert len(shown(caplog)) == 2
    assert all("ours" in text for text in shown(caplog))


def test_what_a_rank_meets_before_it_joins_is_shown_afterwards(once, caplog):
    said: set[str] = set()

    def is_first(text: str) -> bool:
        return text not in said and not said.add(text)

    main = once(0)
    main.show(UserWarning("both"), UserWarning, ELSEWHERE, 7)
    ranks = [main, once(1)]
    assert len(shown(caplog)) == 1
    ranks[1].show(UserWarning("both"), UserWarning, ELSEWHERE, 7)
    ranks[1].show(UserWarning("my GPU"), UserWarning, ELSEWHERE, 9)
    assert len(shown(caplog)) == 1
    for rank in ranks:
        rank.agree_by(is_first)
    ranks[1].show_waiting()
    assert ["both" in text for text in shown(caplog)] == [True, False]
    assert "my GPU" in shown(caplog)[-1]


def test_a_rank_that_cannot_join_shows_what_it_met(once, caplog):
    rank = once(1)
    rank.show(UserWarning("my GPU"), UserWarning, ELSEWHERE, 9)
    rank.show_waiting()
    assert len(shown(caplog)) == 1


def test_ranks_that_cannot_be_asked_do_not_silence_a_warning(once, caplog):
    def is_first(_text):
        raise RuntimeError("connection reset by peer")

    rank = once(2)
    rank.agree_by(is_first)
    rank.show(UserWarning("late"), UserWarning, ELSEWHERE, 7)
    assert "UserWarning: late" in caplog.text


class Complaining(list):
    """A data set whose items warn."""

    def __getitem__(self, index):
        warnings.warn("data worker", UserWarning, stacklevel=1)
        return super().__getitem__(index)


def repeat_warnings() -> None:
    """Warns as other packages do: in every step, on one rank or all, and in data workers."""
    show_warnings_once()
    warnings.warn("before joining", UserWarning, stacklevel=1)
    rank = ranks.initialize()
    for _ in range(5):
        warnings.warn("every rank, every step", FutureWarning, stacklevel=1)
        warnings.warn(f"only rank {rank.number}", UserWarning, stacklevel=1)
        # Makes Python forget which lines have warned.
        with warnings.catch_warnings():
            warnings.simplefilter("default")
        ranks.barrier()
    loader = DataLoader(Complaining(range(4)), num_workers=2, multiprocessing_context="fork")
    assert len(list(loader)) == 4


def test_two_ranks_and_their_data_workers_show_each_others_warnings_once(tmp_path):
    said = "".join(outputs_of(start_function(repeat_warnings, 2, results=tmp_path)))
    assert said.count("every rank, every step") == 1
    assert said.count("before joining") == 1
    assert said.count("only rank 1") == 1
    assert said.count("only rank 0") == 1
    # Workers cannot ask other ranks: once for the two of each.
    assert said.count("data worker") == 2


@pytest.mark.slow
def test_a_training_under_zero_3_repeats_no_warning_of_this_torch(small_world, tmp_path):
    settings = [f"run.folder={tmp_path / 'run'}", "engine.deepspeed=ds_configs/zero3.json"]
    settings += ["train.steps=20", "--ranks", "2"]
    command = [sys.executable, "-m", "srepa_ds", "train", str(small_world.config), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    warned = [
        re.sub(r"^\d\d:\d\d:\d\d ", "", line)
        for line in done.stderr.splitlines()
        if "Warning" in line
    ]
    assert len(warned) == len(set(warned)), done.stderr
