"""What a run has lost: counted over restarts, forgiven by a later checkpoint."""

import json

import pytest

from srepa_ds.errors import OutputError
from srepa_ds.training.rollbacks import (
    SKIPPED,
    begin_anew,
    note_rollback,
    note_skipped,
    setbacks_after,
)


def test_rollbacks_count_until_a_checkpoint_of_the_failed_step(tmp_path):
    none = setbacks_after(tmp_path, 4)
    assert (none.rollbacks, none.samples_seen) == (0, 0)
    note_skipped(tmp_path, 6, not_finite=["flow"], sample_ids=[3, 1])
    note_skipped(tmp_path, 7, not_finite=["flow"], sample_ids=[2])
    note_rollback(tmp_path, 7, to=4, samples_seen=112)
    note_rollback(tmp_path, 6, to=4, samples_seen=144)
    counted = {step: setbacks_after(tmp_path, step) for step in (0, 4, 5, 6, 7, 8)}
    assert [counted[step].rollbacks for step in counted] == [2, 2, 2, 1, 0, 0]
    assert [counted[step].samples_seen for step in counted] == [144, 144, 144, 112, 0, 0]


def test_the_history_is_readable_and_keeps_its_order(tmp_path):
    note_skipped(tmp_path, 6, not_finite=["flow", "cls"], sample_ids=[3, 1])
    note_rollback(tmp_path, 6, to=4, samples_seen=96)
    lines = [json.loads(line) for line in (tmp_path / SKIPPED).read_text().splitlines()]
    assert lines == [
        {"step": 6, "not_finite": ["flow", "cls"], "sample_ids": [3, 1]},
        {"step": 6, "rolled_back_to": 4, "samples_seen": 96},
    ]


@pytest.mark.parametrize("torn", ['{"step": 6, "rolled_ba', "7", '"x"', "[[1]]", "\0\0", "\n"])
def test_a_torn_line_takes_no_other_with_it(tmp_path, torn):
    note_rollback(tmp_path, 6, to=4, samples_seen=96)
    with (tmp_path / SKIPPED).open("a") as file:
        file.write(torn)
    note_rollback(tmp_path, 7, to=4, samples_seen=112)
    assert setbacks_after(tmp_path, 4).rollbacks == 2


def test_a_run_without_checkpoint_begins_its_history_anew(tmp_path):
    begin_anew(tmp_path)
    note_rollback(tmp_path, 6, to=4, samples_seen=96)
    begin_anew(tmp_path)
    assert setbacks_after(tmp_path, 0).rollbacks == 0


def test_a_rollback_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / SKIPPED).mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        note_rollback(tmp_path, 6, to=4, samples_seen=96)
    note_skipped(tmp_path, 6, not_finite=["flow"], sample_ids=[])
