"""Stop signals, as a process receives them: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from srepa_ds.distributed.signals import STOP_SIGNALS

WAITS = """
import os, signal, sys, time
from srepa_ds.distributed import signals
signals.SAME_REQUEST_SECONDS = 1.0
{before}
with signals.stop_requested() as received:
    print("ready", flush=True)
    {body}
print("saved", *received, flush=True)
"""
# A lock taken twice by one thread: like a collective, a wait in C that no signal interrupts.
STUCK = "; ".join(
    [
        "import ctypes",
        "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)",
        "libc.pthread_mutex_lock(lock)",
        "libc.pthread_mutex_lock(lock)",
    ]
)
PATIENT = "\n    ".join(
    [
        "until = time.monotonic() + 20",
        "while not received and time.monotonic() < until:",
        "    time.sleep(0.02)",
    ]
)


def as_from_a_terminal() -> None:
    """Undoes what the tests' own start may have set to be ignored, as `nohup` does."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start(body: str, before: str = "", **settings) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(before=before, body=body)],
        preexec_fn=settings.pop("preexec_fn", as_from_a_terminal),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **settings,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=20)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks(number):
    process = start(PATIENT)
    process.send_signal(number)
    assert end_of(process) == (0, f"saved {int(number)}\n")


def test_two_of_one_request_count_once():
    process = start(PATIENT + "\n    time.sleep(0.2)")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    code, said = end_of(process)
    assert (code, said[:5]) == (0, "saved")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_ends_a_process_that_runs_no_python(number):
    process = start(STUCK)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    assert end_of(process) == (128 + number, "")


def test_a_signal_ignored_from_the_start_stays_ignored():
    process = start(
        "time.sleep(0.5)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    assert end_of(process) == (0, "saved\n")


def test_a_forked_worker_s_signals_are_not_its_parent_s():
    body = """if (child := os.fork()) == 0:
        signals.leave_signals_to_parent()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    time.sleep(0.1)"""
    assert end_of(start(body)) == (0, "saved\n")


@pytest.fixture
def slow_module(tmp_path: Path) -> Path:
    """A folder with a module that takes its time to load, and says when it has begun."""
    (tmp_path / "slow.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(20)\n")
    return tmp_path


def test_ctrl_c_while_modules_load_is_no_traceback(slow_module):
    text = (
        "from srepa_ds.distributed.signals import leave_on_interrupt as leave; leave(); import slow"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        preexec_fn=as_from_a_terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{slow_module}", "RANK": "0"},
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_ctrl_c_elsewhere_lets_files_be_cleaned_up():
    text = (
        "import time\nfrom srepa_ds.distributed.signals import leave_on_interrupt\n"
        "leave_on_interrupt()\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(20)\n"
        "except KeyboardInterrupt:\n    print('cleaned up')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        preexec_fn=as_from_a_terminal,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (0, "cleaned up\n")
