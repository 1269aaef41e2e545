"""What users get wrong: one clear message, exit code 2, nothing left behind.

The tables are in `bad_input/`; a new row of one of them is tested at once.
"""

import re
import subprocess
import sys
from collections import Counter

import pytest
from bad_input import (
    command_lines,
    damaged,
    fields,
    files,
    importing,
    inputs,
    models,
    on_ranks,
    outputs,
    paths,
    preparing,
    settings,
)
from bad_input.arrangements import overflowing_teacher
from bad_input.case import Case, Place
from builders import contents

from srepa_ds.cli import run
from srepa_ds.distributed import ranks

TABLES = (
    *(command_lines, damaged, fields, files, importing, inputs, models),
    *(outputs, paths, preparing, settings),
)
CASES = [case for table in TABLES for case in table.CASES]


@pytest.fixture
def place(small_world, tmp_path, monkeypatch) -> Place:
    """A copy of the small world to spoil, as the working directory."""
    folder = small_world.copied_to(tmp_path / "place").folder
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SREPA_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return Place(folder)


def command_line(case: Case, place: Place) -> list[str]:
    text = case.command.format(folder=place.folder)
    return [str(place.folder / "experiment.yaml") if w == "CONFIG" else w for w in text.split()]


def assert_one_message(text: str, words: tuple[str, ...]) -> None:
    assert "Traceback" not in text
    assert [line[:6] for line in text.splitlines()].count("error:") == 1, text
    message = text[text.index("error:") :]
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_message_code_2_and_nothing_left_behind(case, place, capfd):
    case.arrange(place)
    before = contents(place.folder)
    code = run(command_line(case, place))
    assert not ranks.joined()
    captured = capfd.readouterr()
    assert code == 2, captured
    assert_one_message(captured.err, case.words)
    assert captured.out == ""
    after = contents(place.folder)
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize("case", on_ranks.CASES, ids=str)
def test_ranks_speak_with_one_voice(case, place):
    case.arrange(place)
    before = contents(place.folder)
    command = [sys.executable, "-m", "srepa_ds", *command_line(case, place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    assert_one_message(done.stderr, case.words)
    assert contents(place.folder) == before


@pytest.mark.slow
def test_samples_on_which_a_teacher_fails_are_named(place):
    bad = overflowing_teacher(place)
    assert 0 < len(bad)
    arguments = ["train", str(place.folder / "experiment.yaml"), "--ranks", "2"]
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    words = ("alignments.0.teacher: 'vit_tiny_patch16_224' gives tokens that are not finite",)
    assert_one_message(done.stderr, words)
    named = re.search(r"for sample\(s\) ([\d, ]+)", done.stderr).group(1)
    assert {int(number) for number in named.split(",") if number.strip()} <= set(bad)


@pytest.mark.slow
def test_ranks_that_diverge_say_so_once(place):
    settings = ["optimizer.learning_rate=1e30", "train.max_skipped_steps=2"]
    settings += ["train.log_every_steps=50"]
    arguments = ["train", str(place.folder / "experiment.yaml"), *settings, "--ranks", "2"]
    command = [sys.executable, "-m", "srepa_ds", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done
    assert_one_message(done.stderr, ("steps 2 to 3 were not finite", "skipped.jsonl"))


def test_every_row_has_its_own_name():
    names = Counter(case.name for table in TABLES for case in table.CASES)
    assert max(names.values()) == 1, names.most_common(3)
    assert len(names) >= 150


def test_debugging_shows_where_it_arose(place, monkeypatch, capfd):
    monkeypatch.setenv("SREPA_DEBUG", "1")
    assert run(["train", "nowhere.yaml"]) == 2
    text = capfd.readouterr().err
    assert "Traceback" in text
    assert text.splitlines()[-2].startswith("error: nowhere.yaml")
