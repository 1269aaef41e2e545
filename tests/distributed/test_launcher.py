"""Ranks on this machine: their surroundings, their signals, and how they end together."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from srepa_ds.distributed import launcher
from srepa_ds.distributed import signals as launcher_signals
from srepa_ds.distributed.launcher import run_ranks
from srepa_ds.distributed.signals import STOP_SIGNALS
from srepa_ds.distributed.surroundings import launched
from srepa_ds.errors import TopologyError

# Stands where Python would: the launcher runs `PROGRAM -m srepa_ds BEHAVIOURS FOLDER`.
PROGRAM = f"""#!{sys.executable} -SE
import json, os, signal, socket, sys, time
behaviours, folder = sys.argv[3].split(","), sys.argv[4]
rank = int(os.environ["RANK"])
behaviour, received = behaviours[rank], []
if behaviour in ("count", "stubborn"):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: received.append(number))
if rank == 0:
    given = socket.socket(fileno=int(os.environ["SREPA_STORE_DESCRIPTOR"]))
    assert given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert given.getsockname() == ("127.0.0.1", int(os.environ["MASTER_PORT"]))
document = {{"pid": os.getpid(), "sid": os.getsid(0), "env": dict(os.environ)}}
with open(f"{{folder}}/{{rank}}.new", "w") as file:
    json.dump(document, file)
os.rename(f"{{folder}}/{{rank}}.new", f"{{folder}}/{{rank}}.json")
if behaviour.isdigit():
    sys.exit(int(behaviour))
if behaviour == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
until = time.monotonic() + 30
while time.monotonic() < until:
    time.sleep(0.02)
    if behaviour == "count" and received:
        time.sleep(0.3)
        sys.exit(70 + len(received))
"""


@pytest.fixture(autouse=True)
def _as_from_a_terminal():
    """Undoes what the tests' own start may have set to be ignored, as `nohup` does."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs ranks that behave as told and returns the exit code."""
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def run(*behaviours: str, **settings: float) -> int:
        settings = {"leave_seconds": 0.3, **settings}
        arguments = [",".join(behaviours), str(tmp_path)]
        return run_ranks(arguments, len(behaviours), **settings)

    return run


def told(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def assert_gone(folder: Path, number: int) -> None:
    processes = told(folder)
    assert len(processes) == number
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process["pid"], 0)


def test_every_rank_knows_its_place(launch, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch("0", "0", "0") == 0
    environments = [process["env"] for process in told(tmp_path)]
    for rank, found in enumerate(environments):
        assert found["RANK"] == found["LOCAL_RANK"] == str(rank)
        assert found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] == "3"
        assert found["MASTER_ADDR"] == "127.0.0.1"
        assert int(found["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 3)
    assert len({found["MASTER_PORT"] for found in environments}) == 1
    sessions = {process["sid"] for process in told(tmp_path)}
    assert len(sessions) == 3
    assert os.getsid(0) not in sessions
    assert_gone(tmp_path, 3)


def test_the_users_thread_count_is_kept(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch("0")
    assert told(tmp_path)[0]["env"]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("behaviours", "code"),
    [(("0",), 0), (("2", "2"), 2), (("0", "75"), 75), (("crash",), 128 + signal.SIGKILL)],
)
def test_the_exit_code_is_that_of_a_rank_that_failed(launch, behaviours, code):
    assert launch(*behaviours) == code


def test_a_failing_rank_ends_the_others(launch, tmp_path):
    began = time.monotonic()
    assert launch("sleep", "3", "sleep") == 3
    assert time.monotonic() - began < 15
    assert_gone(tmp_path, 3)


def test_a_rank_that_will_not_leave_is_made_to(launch, tmp_path):
    assert launch("crash", "stubborn", kill_seconds=1.0) == 128 + signal.SIGKILL
    assert_gone(tmp_path, 2)


def send_when_ready(folder: Path, rank: int, *numbers: int) -> threading.Thread:
    """Sends this process signals, one second after the other, once all ranks are there."""

    def wait_and_send() -> None:
        deadline = time.monotonic() + 20
        while len(list(folder.glob("*.json"))) < rank and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(launcher_signals.SAME_REQUEST_SECONDS + 0.3)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_exactly_once(launch, tmp_path, number):
    before = signal.getsignal(number)
    thread = send_when_ready(tmp_path, 2, number)
    assert launch("count", "count") == 71
    thread.join()
    assert signal.getsignal(number) is before
    assert_gone(tmp_path, 2)


def test_a_second_signal_ends_ranks_that_do_not_heed_the_first(launch, tmp_path, capfd):
    thread = send_when_ready(tmp_path, 2, signal.SIGTERM, signal.SIGINT)
    began = time.monotonic()
    assert launch("stubborn", "stubborn") == 128 + signal.SIGINT
    assert time.monotonic() - began < 15
    thread.join()
    assert_gone(tmp_path, 2)
    assert capfd.readouterr().err == "stopping; a second signal ends the ranks at once\n"


def test_a_lost_terminal_does_not_keep_the_ranks_from_saving(launch, tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    kept = os.dup(2)
    os.dup2(write_end, 2)
    try:
        thread = send_when_ready(tmp_path, 2, signal.SIGTERM)
        assert launch("count", "count") == 71
        thread.join()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(write_end)


def test_a_rank_that_was_killed_is_named(launch, capfd):
    launch("stubborn", "crash", kill_seconds=0.5)
    said = capfd.readouterr().err
    assert said.startswith("rank 1 was ended by SIGKILL (by hand, by a scheduler, or by the system")
    assert said.endswith("; ending the other ranks\n")


def test_a_rank_that_failed_is_named_only_if_others_must_be_ended(launch, capfd):
    assert launch("2", "2") == 2
    assert capfd.readouterr().err == ""
    assert launch("sleep", "3") == 3
    assert capfd.readouterr().err == "rank 1 ended with code 3; ending the other ranks\n"


def test_an_ignored_signal_stays_ignored(launch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        thread = send_when_ready(tmp_path, 2, signal.SIGHUP, signal.SIGTERM)
        assert launch("count", "count") == 71
        thread.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_exception_leaves_no_rank_behind(launch, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def sleep(seconds: float) -> None:
        if len(list(tmp_path.glob("*.json"))) == 2:
            monkeypatch.setattr(launcher.time, "sleep", real_sleep)
            raise Stop
        real_sleep(seconds)

    real_sleep = time.sleep
    monkeypatch.setattr(launcher.time, "sleep", sleep)
    with pytest.raises(Stop):
        launch("sleep", "stubborn")
    assert_gone(tmp_path, 2)


@pytest.mark.parametrize("number", [0, -1])
def test_fewer_than_one_rank_is_an_error(number):
    with pytest.raises(TopologyError, match="--ranks must be at least 1"):
        run_ranks(["train"], number)


def test_a_launcher_is_known_by_its_variables(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launched()
    monkeypatch.setenv("RANK", "0")
    assert launched()
