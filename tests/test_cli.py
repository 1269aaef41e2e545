"""The command line itself: help, version, hints, and where errors come from."""

import os
import threading

import pytest
from places import ROOT

from srepa_ds import __version__
from srepa_ds.cli import run

DIGITS = str(ROOT / "configs/digits-sit.yaml")


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"srepa_ds {__version__}\n"


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["train", "-h"], ["init", "-h"]])
def test_help_has_a_short_name(capsys, arguments):
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "Usage:" in said
    assert "-h, --help" in said


@pytest.mark.parametrize(
    "given", [["--train.steps", "5"], ["--train.steps=5"], ["-train.steps", "5"]]
)
def test_a_setting_given_as_an_option(capsys, given):
    assert run(["train", DIGITS, *given]) == 2
    assert ("write a setting as train.steps=VALUE" in capsys.readouterr().err) == (
        given[0] != "-train.steps"
    )


@pytest.mark.parametrize(
    ("value", "is_on"),
    [("1", True), ("yes", True), ("0", False), ("", False), ("false", False), ("Off", False)],
)
def test_debugging_can_be_switched_off(monkeypatch, capsys, value, is_on):
    monkeypatch.setenv("SREPA_DEBUG", value)
    assert run(["config", "nowhere.yaml"]) == 2
    assert ("Traceback" in capsys.readouterr().err) == is_on


def test_a_pipe_as_configuration(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text, kind in ((f"base: {DIGITS}\n", "experiment"), ("kind: prepare\n", "prepare")):
        if kind == "prepare":
            text = (ROOT / "configs/digits-prepare.yaml").read_text()
        writer = threading.Thread(target=pipe.write_text, args=(text,), daemon=True)
        writer.start()
        assert run(["config", str(pipe)]) == 0
        writer.join(10)
        assert f"kind: {kind}\n" in capsys.readouterr().out
    assert run(["train", str(pipe), "--ranks", "2"]) == 2
    assert "a pipe can be read once" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "export", "sample", "evaluate", "sweep", "structure", "report"]
)
def test_a_prepare_file_given_to_another_command_is_one_fault(capsys, command):
    path = ROOT / "configs/digits-prepare.yaml"
    assert run([command, str(path)]) == 2
    said = capsys.readouterr().err
    assert "1 fault\n" in said
    assert f"kind 'prepare', not 'experiment'; run `srepa-ds prepare {path}`" in said


@pytest.mark.parametrize("kind", ["prepar", "[1]", "null", "5", "{}"])
def test_an_unknown_kind(capsys, kind):
    assert run(["config", DIGITS, f"kind={kind}"]) == 2
    said = capsys.readouterr().err
    assert "kind: unknown" in said
    assert said.count("error:") == 1
