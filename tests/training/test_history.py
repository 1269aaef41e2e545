"""The history of skipped steps and rollbacks: kept over restarts, until a later checkpoint."""

import json

import pytest

from srepa_ds.errors import OutputError
from srepa_ds.run_folder import RunFolder
from srepa_ds.training.history import add_rollback, add_skipped, clear_history, rollbacks_after


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_rollbacks_count_until_a_checkpoint_of_the_failed_step(run):
    none = rollbacks_after(run, 4)
    assert (none.count, none.samples_seen) == (0, 0)
    add_skipped(run, 6, not_finite=["flow"], sample_ids=[3, 1])
    add_skipped(run, 7, not_finite=["flow"], sample_ids=[2])
    add_rollback(run, 7, to=4, samples_seen=112)
    add_rollback(run, 6, to=4, samples_seen=144)
    counted = {step: rollbacks_after(run, step) for step in (0, 4, 5, 6, 7, 8)}
    assert [counted[step].count for step in counted] == [2, 2, 2, 1, 0, 0]
    assert [counted[step].samples_seen for step in counted] == [144, 144, 144, 112, 0, 0]


def test_the_history_is_readable_and_keeps_its_order(run):
    add_skipped(run, 6, not_finite=["flow", "cls"], sample_ids=[3, 1])
    add_rollback(run, 6, to=4, samples_seen=96)
    lines = [json.loads(line) for line in (run.path / "skipped.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 6, "not_finite": ["flow", "cls"], "sample_ids": [3, 1]},
        {"step": 6, "rolled_back_to": 4, "samples_seen": 96},
    ]


@pytest.mark.parametrize("torn", ['{"step": 6, "rolled_ba', "7", '"x"', "[[1]]", "\0\0", "\n"])
def test_a_torn_line_takes_no_other_with_it(run, torn):
    add_rollback(run, 6, to=4, samples_seen=96)
    with run.skipped.open("a") as file:
        file.write(torn)
    add_rollback(run, 7, to=4, samples_seen=112)
    assert rollbacks_after(run, 4).count == 2


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"step": 6, "rolled_back_to": 4, "samples_seen": 1, "note": "\xfc"}\n',
        b'{"step": 6, "rolled_back_to": 4}\n',
        b'{"rolled_back_to": 4, "samples_seen": 96}\n',
        b'{"step": "6", "rolled_back_to": 4, "samples_seen": 96}\n',
        b'{"step": 6, "rolled_back_to": 4, "samples_seen": Infinity}\n',
        b'{"step": 6}\n',
        b"\0\0\0\n",
    ],
)
def test_a_damaged_line_is_set_aside_and_the_others_count(run, caplog, damaged):
    add_skipped(run, 5, not_finite=["flow"], sample_ids=[1])
    add_rollback(run, 6, to=4, samples_seen=96)
    before = run.skipped.read_bytes()
    run.skipped.write_bytes(damaged + before)
    add_rollback(run, 7, to=4, samples_seen=112)
    rest = run.skipped.read_bytes().removeprefix(damaged)
    found = rollbacks_after(run, 4)
    assert (found.count, found.samples_seen) == (2, 112)
    assert run.skipped.read_bytes() == rest
    assert rest.startswith(before)
    assert (run.path / "skipped.jsonl.bad").read_bytes() == damaged
    assert "1 damaged line (the first is line 1); moved to skipped.jsonl.bad" in caplog.text


def test_a_history_that_cannot_be_set_right_still_counts(run, caplog):
    add_rollback(run, 6, to=4, samples_seen=96)
    run.skipped.write_bytes(b"damaged\n" + run.skipped.read_bytes())
    (run.path / "skipped.jsonl.bad").mkdir()
    assert rollbacks_after(run, 4).count == 1
    assert "cannot write skipped.jsonl: Is a directory" in caplog.text
    assert run.skipped.read_bytes().startswith(b"damaged\n")


def test_a_history_that_cannot_be_read_is_an_error(run):
    run.skipped.mkdir()
    with pytest.raises(OutputError, match="which counts the run's rollbacks: Is a directory; fix"):
        rollbacks_after(run, 4)


def test_a_run_without_checkpoint_starts_a_new_history(run):
    clear_history(run)
    add_rollback(run, 6, to=4, samples_seen=96)
    clear_history(run)
    assert rollbacks_after(run, 0).count == 0


def test_a_rollback_that_cannot_be_written_is_an_error(run):
    run.skipped.mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        add_rollback(run, 6, to=4, samples_seen=96)
    add_skipped(run, 6, not_finite=["flow"], sample_ids=[])
