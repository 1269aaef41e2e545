"""The program as a process: its streams, its surroundings, what launchers do to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.cli import run

PROGRAM = [sys.executable, "-m", "srepa_ds"]


def started(
    *arguments: str, folder: Path, closing: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the program in `folder` from a shell; `closing` is a shell's redirection."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", *PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )


def test_an_error_without_stderr_goes_to_stdout(tmp_path):
    done = started("trian", folder=tmp_path, closing="2>&-")
    assert done.returncode == 2
    assert done.stdout.startswith("error: No such command 'trian'")


def test_an_error_without_any_stream_has_its_exit_code(tmp_path):
    done = started("trian", folder=tmp_path, closing="0<&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    config = ROOT / "configs" / "digits-sit.yaml"
    with subprocess.Popen(
        [*PROGRAM, "config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.slow
def test_python_files_in_the_working_directory_are_not_imported(tmp_path):
    for name in ("yaml.py", "typer.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the working directory')")
    alone = started("trian", folder=tmp_path)
    ranks = started("train", "nowhere.yaml", "--ranks", "2", folder=tmp_path)
    for done, words in ((alone, "No such command"), (ranks, "nowhere.yaml")):
        assert done.returncode == 2, done
        assert words in done.stderr
        assert "imported" not in done.stderr


def test_deepspeed_s_launcher_may_pass_a_local_rank(capsys):
    for option in ("--local_rank=1", "--local-rank=0"):
        assert run([option, "train", "nowhere.yaml"]) == 2
        assert capsys.readouterr().err.startswith("error: nowhere.yaml")


@pytest.mark.parametrize("command", ["fetch", "teacher", "export", "structure", "report", "parity"])
def test_commands_of_one_process_refuse_several(command, monkeypatch, capsys):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert run([command, str(ROOT / "configs" / "digits-sit.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: `srepa-ds {command}` runs in one process")


def test_a_port_in_use_is_one_message(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = started(
            "train",
            str(ROOT / "configs" / "digits-sit.yaml"),
            folder=tmp_path,
            RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    assert done.returncode == 2, done
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "is in use; choose another" in line
    assert "Traceback" not in done.stderr
