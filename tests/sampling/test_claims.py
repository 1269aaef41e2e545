"""Claims on units of a folder: taken once, given back, and taken over from dead owners."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from srepa_ds.errors import TopologyError
from srepa_ds.files import process_mark
from srepa_ds.sampling.claims import (
    CLAIM_SECONDS,
    Claims,
    Process,
    claim_seconds,
    is_left_over,
)

OWN = Process.own()


def of_a_process_that_has_ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _mark_of(pid: int) -> str:
    return f"{process_mark().rpartition('-')[0]}-{pid}"


def claim_of(owner: Process | None, path, *, age: float = 0.0, content: bytes = b"") -> None:
    """Writes a claim by hand, as another process would have."""
    path.write_bytes(content if owner is None else json.dumps(owner._asdict()).encode())
    then = time.time() - age
    os.utime(path, (then, then))


def test_one_of_two_holds_a_unit_until_it_is_given_back(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a")
        assert not one.take("a")
        assert not other.take("a")
        assert other.take("b")
        assert (one.held, other.held) == (1, 1)
        one.release("a")
        assert other.take("a")
        # Another's, which stays.
        one.release("a")
        assert not one.take("a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("owner", "content", "age", "is_taken"),
    [
        # On another machine only time tells.
        (OWN._replace(host="node-7"), b"", 5, False),
        (OWN._replace(host="node-7"), b"", 500, True),
        # On this one the process does, where it means the same number.
        (OWN, b"", 5, False),
        (OWN._replace(start="1"), b"", 5, True),
        (OWN._replace(pid=of_a_process_that_has_ended()), b"", 5, True),
        (OWN._replace(pid=of_a_process_that_has_ended(), space="a container"), b"", 5, False),
        (OWN._replace(pid=1 << 70), b"", 5, False),
        # Garbage, and a process killed between making the file and writing it.
        (None, b"", 5, False),
        (None, b"", 500, True),
        (None, b"\xff\x00{", 500, True),
        (None, b'{"host": 3}', 5, False),
        (None, b"[" * 5000, 500, True),
        (None, b'{"host": "", "space": "", "pid": "x", "start": 1}', 500, True),
    ],
)
def test_stale_claims_are_taken_over(tmp_path, owner, content, age, is_taken):
    path = tmp_path / "a.claim"
    claim_of(owner, path, age=age, content=content)
    before = path.read_bytes()
    with Claims(tmp_path, seconds=60.0) as claims:
        assert claims.take("a") == is_taken
        assert (path.read_bytes() == before) != is_taken
    assert path.exists() != is_taken
    assert not [found.name for found in tmp_path.iterdir() if found != path]


def test_one_of_many_takes_a_stale_claim_over(tmp_path):
    attempts, winners = 20, 0
    for attempt in range(attempts):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        claim_of(OWN._replace(host="node-7"), folder / "a.claim", age=500)
        rivals = [Claims(folder, seconds=60.0) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda claims: claims.take("a"), rivals))
        assert any(won)
        winners += won.count(True)
        assert [path.name for path in folder.glob("*.claim*")] == ["a.claim"]
    # A second one is harmless and rare; without care there would be eight.
    assert winners < 2 * attempts


def test_a_held_claim_is_touched_and_one_that_was_lost_is_not(tmp_path):
    path = tmp_path / "a.claim"
    with Claims(tmp_path, seconds=0.4) as claims:
        assert claims.take("a")
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Another machine has taken it over, because this process was paused.
        claim_of(OWN._replace(host="node-7"), path, age=100)
        touched = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns == touched
    assert path.exists()


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    with Claims(tmp_path / "parts") as claims, pytest.raises(FileNotFoundError):
        claims.take("a")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_the_time_must_be_a_number_of_seconds(monkeypatch, text):
    monkeypatch.setenv(CLAIM_SECONDS, "2.5")
    assert claim_seconds() == 2.5
    monkeypatch.setenv(CLAIM_SECONDS, text)
    with pytest.raises(TopologyError, match=f"{CLAIM_SECONDS} is '{text}'; give a positive"):
        claim_seconds()


@pytest.mark.parametrize(
    ("writer", "age", "expected"),
    [
        (process_mark(), 500, False),
        (_mark_of(of_a_process_that_has_ended()), 0, True),
        # Another container on this machine, with its own numbers of processes.
        (f"{OWN.host}-0badcafe-{of_a_process_that_has_ended()}", 5, False),
        ("node-7-12", 5, False),
        ("node-7-12", 500, True),
    ],
    # Numbers of processes would give each worker of pytest-xdist other tests.
    ids=[
        "own",
        "of an ended process",
        "of another container",
        "renewed elsewhere",
        "left elsewhere",
    ],
)
def test_what_a_living_process_writes_is_not_left_over(tmp_path, writer, age, expected):
    path = tmp_path / f"samples.npz.{writer}.partial"
    path.write_text("half")
    then = time.time() - age
    os.utime(path, (then, then))
    assert is_left_over(path, after_seconds=60.0) == expected
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
