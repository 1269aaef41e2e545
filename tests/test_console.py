import logging

import pytest

from srepa_ds import console
from srepa_ds.console import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (119.0, "119 s"),
        (150.0, "2 min"),
        (7100.0, "118 min"),
        (11_100.0, "3 h 5 min"),
    ],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_a_log_gets_a_line_for_each_tenth_and_every_five_minutes(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with (
        caplog.at_level(logging.INFO, logger="srepa_ds"),
        Progress("images", total=10_000, is_main=True) as progress,
    ):
        for done in (1, 2, 600, 900, 1000, 1001, 10_000):
            now[0] += 100
            progress.at(done)
    assert caplog.messages == [
        "images 600/10,000  5 min, 2.0/s, 78 min left",
        "images 1,000/10,000  8 min, 2.0/s, 75 min left",
        "images 10,000/10,000  12 min, 14.3/s",
    ]


def test_other_ranks_show_nothing(caplog):
    with (
        caplog.at_level(logging.INFO, logger="srepa_ds"),
        Progress("images", total=1, is_main=False) as progress,
    ):
        progress.at(1)
    assert not caplog.messages
