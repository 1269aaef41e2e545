"""Warnings: which fail a test, and which of them a user sees."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ranks import run_worker

from srepa_ds.console import WarningsOnce


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
    """Warnings are shown once, and those of this package the way they were."""
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *given: shown.append(str(given[0])))
    monkeypatch.delenv("RANK", raising=False)
    return WarningsOnce(), shown


ELSEWHERE = "/site-packages/torch/distributed/c10d.py"


def test_what_another_package_repeats_is_shown_once(once, caplog):
    shower, _ = once
    for text in ("old", "old", "new", "old"):
        shower.show(FutureWarning(text), FutureWarning, ELSEWHERE, 7)
    shower.show(FutureWarning("old"), FutureWarning, ELSEWHERE, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "FutureWarning: old (torch/distributed/c10d.py:7; shown once)",
        "FutureWarning: new (torch/distributed/c10d.py:7; shown once)",
        "FutureWarning: old (torch/distributed/c10d.py:8; shown once)",
    ]


def test_our_own_are_never_lost(once, monkeypatch, caplog):
    shower, shown = once
    monkeypatch.setenv("RANK", "3")
    ours = str(Path(__file__).parents[1] / "srepa_ds" / "engine.py")
    for _ in range(3):
        shower.show(UserWarning("ours"), UserWarning, ours, 7)
        shower.show(UserWarning("theirs"), UserWarning, ELSEWHERE, 7)
    assert shown == ["ours"] * 3
    assert not caplog.records


def test_ranks_that_cannot_be_asked_do_not_silence_a_warning(once, caplog):
    def is_first(_key):
        raise RuntimeError("connection reset by peer")

    shower, _ = once
    shower.is_first = is_first
    shower.show(UserWarning("late"), UserWarning, ELSEWHERE, 7)
    assert "UserWarning: late" in caplog.text


def test_two_ranks_show_each_others_warnings_once():
    said = "".join(run_worker("repeating", 2))
    assert said.count("every rank, every step") == 1
    assert said.count("only rank 1") == 1
    assert said.count("only rank 0") == 1


@pytest.mark.slow
def test_a_training_under_zero_3_repeats_no_warning(small_world, tmp_path):
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
